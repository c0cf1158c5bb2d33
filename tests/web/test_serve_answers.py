"""The official client against a real server: both endpoints, streaming and not, equal to the model asked directly."""

from typing import Any

import httpx
import openai
import pytest

from trinity.engine.loaded import LoadedModel

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def test_models(running) -> None:
    client = running.client()
    (model,) = client.models.list().data
    assert (model.id, model.object) == (running.name, "model")
    assert client.models.retrieve(running.name).id == running.name
    with pytest.raises(openai.NotFoundError, match=f"Known: {running.name}"):
        client.models.retrieve("someone/else")


def test_chat_equals_the_model(running, loaded: LoadedModel) -> None:
    expected = loaded.chat(HELLO, max_new_tokens=12)
    answer = running.client().chat.completions.create(
        model=running.name, messages=HELLO, max_completion_tokens=12, temperature=0
    )
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.id.startswith("chatcmpl-")
    assert answer._request_id


def test_chat_stream_equals_the_whole(running) -> None:
    client = running.client()
    asked: dict[str, Any] = {
        "model": running.name,
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        ],
        "max_tokens": 10,
        "temperature": 1.1,
        "seed": 6,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "user": "someone",
        "metadata": {"a": "b"},
        "store": False,
        "extra_body": {"top_k": 200, "min_p": 0.001, "repetition_penalty": 1.05},
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
        assert choice.logprobs is not None
        assert [e for part in own if part.logprobs for e in part.logprobs.content or []] == choice.logprobs.content
        for entry in choice.logprobs.content or []:
            assert entry.logprob <= 0
            assert len(entry.top_logprobs) == 2
    contents = [choice.message.content for choice in whole.choices]
    assert contents[0] != contents[1], "choices of one seed are drawn apart"


def test_completions_of_every_prompt_shape(running, loaded: LoadedModel) -> None:
    client = running.client()
    ids = list(loaded.prompt("def wrap"))
    expected = loaded.generate("def wrap", max_new_tokens=8)
    for prompt in ("def wrap", ids):
        answer = client.completions.create(model=running.name, prompt=prompt, max_tokens=8, temperature=0)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, expected.finish_reason)
    several = client.completions.create(
        model=running.name, prompt=["import", "def wrap"], max_tokens=8, temperature=0, n=2, stop=None
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[2].text == several.choices[3].text == expected.text
    assert several.usage is not None
    assert several.usage.prompt_tokens == len(loaded.prompt("import")) + len(ids)
    of_ids = client.completions.create(model=running.name, prompt=[ids, ids], max_tokens=8, temperature=0)
    assert [choice.text for choice in of_ids.choices] == [expected.text] * 2


def test_echo_with_logprobs_scores_a_text(running, loaded: LoadedModel) -> None:
    text = "def wrap(text, width=70):\n    ümlaut"
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text)]
    for prompt in (text, ids):
        answer = running.client().completions.create(
            model=running.name, prompt=prompt, max_tokens=0, echo=True, logprobs=1, temperature=0
        )
        choice = answer.choices[0]
        assert (choice.text, choice.finish_reason) == (text, "length")
        assert choice.logprobs is not None
        scores = choice.logprobs.token_logprobs
        assert scores is not None
        assert scores[0] is None
        assert scores[1:] == pytest.approx(loaded.score(text), abs=1e-4)
        assert len(choice.logprobs.tokens or []) == len(ids) == len(choice.logprobs.top_logprobs or [])
        offsets = choice.logprobs.text_offset
        assert offsets is not None
        assert offsets == sorted(offsets)
        assert text[offsets[2] :].startswith((choice.logprobs.tokens or [])[2])


def test_completion_stream_with_echo_and_stop(running, loaded: LoadedModel) -> None:
    free = loaded.generate("import", max_new_tokens=24)
    stop = free.text[len(free.text) // 2 :][:3]
    asked: dict[str, Any] = {
        "model": running.name,
        "prompt": "import",
        "max_tokens": 24,
        "temperature": 0,
        "echo": True,
        "stop": [stop, "never in this text"],
        "logprobs": 2,
    }
    whole = running.client().completions.create(**asked)
    assert whole.choices[0].text == "import" + free.text.partition(stop)[0]
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(running.client().completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"
    streamed = [
        token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens or []
    ]
    assert whole.choices[0].logprobs is not None
    assert streamed == whole.choices[0].logprobs.tokens


def test_raw_stream_is_server_sent_events_with_done(running) -> None:
    body = {"model": running.name, "messages": HELLO, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{running.url}/chat/completions", json=body, timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_logit_bias_and_stop_tokens(running, loaded: LoadedModel) -> None:
    client = running.client()
    forced = client.completions.create(
        model=running.name, prompt="a", max_tokens=3, temperature=0, logit_bias={"65": 100}
    )
    assert forced.choices[0].text == loaded.tokenizer.decode([65] * 3)
    stopped = client.completions.create(
        model=running.name,
        prompt="a",
        max_tokens=3,
        logit_bias={"65": 100},
        extra_body={"stop_token_ids": [65]},
    )
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
