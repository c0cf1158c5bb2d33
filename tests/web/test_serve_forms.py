"""Answers held to a form through the API: whole and streamed, by OpenAI's field and by vLLM's."""

import json
import re
from typing import Any

import openai
import pytest
from pydantic import BaseModel

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


class Pair(BaseModel):
    left: bool
    right: None


def asked(running, **more: Any) -> dict[str, Any]:
    return {"model": running.name, "messages": HELLO, "max_tokens": 300, "seed": 4, "temperature": 1.0} | more


def text_of(running, **more: Any) -> str:
    """The answer, which must be the same when it is streamed."""
    client = running.client()
    whole = client.chat.completions.create(**asked(running, **more)).choices[0]
    chunks = list(client.chat.completions.create(**asked(running, **more), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "stop"
    return whole.message.content


def test_a_json_schema_and_any_object(running) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, None]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    value = json.loads(text_of(running, response_format=form))
    assert value in ({"a": 1}, {"a": None})
    brace = {str(token): 12.0 for token in running.server.service.loaded.tokenizer.encode("}")}
    assert isinstance(json.loads(text_of(running, response_format={"type": "json_object"}, logit_bias=brace)), dict)


def test_the_clients_own_parsing(running) -> None:
    answer = running.client().chat.completions.parse(**asked(running, response_format=Pair))
    assert isinstance(answer.choices[0].message.parsed, Pair)


@pytest.mark.parametrize(
    ("form", "expression"),
    [
        ({"regex": "[ab]{3}é"}, "[ab]{3}é"),
        ({"choice": ['yes "é"', "no\n", "\\d"]}, r'yes "é"|no\n|\\d'),
        ({"grammar": 'start: "x" Y\nY: /[0-9]{2}/'}, "x[0-9]{2}"),
        ({"json": {"const": [1]}}, r"\[\s*1\s*\]"),
        ({"json": '{"type": "null"}'}, "null"),
    ],
)
def test_the_forms_of_vllm(running, form: dict[str, Any], expression: str) -> None:
    assert re.fullmatch(expression, text_of(running, extra_body={"structured_outputs": form}))


def test_thinking_is_free(running) -> None:
    mark = running.server.service.loaded.tokenizer.id_of("</think>")
    more = {"extra_body": {"structured_outputs": {"regex": "[01]{4}"}, "after_think": True}, "logit_bias": {mark: 5.0}}
    thought, _, answer = text_of(running, **more).partition("</think>")
    assert thought
    assert re.fullmatch("[01]{4}", answer)


def test_refusals_name_keyword_and_field(running) -> None:
    client = running.client()
    schema = {"type": "array", "contains": {"type": "null"}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="uses 'contains'") as caught:
        client.chat.completions.create(**asked(running, response_format=form))
    assert caught.value.param == "response_format"
    both = {"response_format": {"type": "json_object"}, "extra_body": {"structured_outputs": {"regex": "a"}}}
    with pytest.raises(openai.BadRequestError, match="both given"):
        client.chat.completions.create(**asked(running, **both))
    banned = dict.fromkeys(range(running.server.service.loaded.tokenizer.vocab_size), -100)
    with pytest.raises(openai.BadRequestError, match="logit_bias forbids every token") as caught:
        client.chat.completions.create(
            **asked(running, logit_bias=banned, extra_body={"structured_outputs": {"regex": "a"}})
        )
    assert caught.value.param == "logit_bias"


def test_a_dead_end_is_the_requests_fault_and_ends_a_stream(running) -> None:
    client = running.client()
    more = {"extra_body": {"structured_outputs": {"grammar": 'start: "1" NOTHING\nNOTHING: /[^\\s\\S]/'}}}
    with pytest.raises(openai.BadRequestError, match="no token at this place"):
        client.chat.completions.create(**asked(running, **more))
    with pytest.raises(openai.APIError, match="no token at this place"):
        list(client.chat.completions.create(**asked(running, **more), stream=True))
    assert text_of(running, extra_body={"structured_outputs": {"regex": "ab"}}) == "ab"
