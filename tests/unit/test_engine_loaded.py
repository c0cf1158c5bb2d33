"""The public face of a loaded model: logits, generate, score, chat, stream; precision; refusals."""

import inspect
import json
import re
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import trinity
from trinity.base.errors import CheckpointError, RequestError, UsageError
from trinity.ckpt.hf import write_hf
from trinity.ckpt.opened import open_model
from trinity.cli.main import main
from trinity.config.engine import EngineLimits
from trinity.engine.loaded import LoadedModel, load
from trinity.engine.request import SamplingParams
from trinity.kernels.compiled import is_loaded
from trinity.model.generate import continue_greedily
from trinity.model.init import build_model
from trinity.recipes.table import recipe
from trinity.text.train_bpe import train_bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "little"
    folder.mkdir()
    model = build_model(replace(recipe("debug").model, max_position_embeddings=256), 5)
    for bias in model.expert_biases():
        bias.copy_(torch.linspace(-0.1, 0.1, len(bias)) / 3)
    write_hf(folder, model)
    train_bpe([inspect.getsource(textwrap)] * 2, 512).save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(folder)


def test_generate_equals_the_oracle_and_carries_logprobs(folder: Path, loaded: LoadedModel) -> None:
    prompt = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode("def wrap(text):")]
    answer = loaded.generate("def wrap(text):", max_new_tokens=20)
    assert answer.token_ids == continue_greedily(open_model(folder).model, prompt, 20, set(loaded.end_ids))
    assert answer == loaded.generate(prompt, max_new_tokens=20)
    assert len(answer.logprobs) == len(answer.token_ids)
    scores = loaded.score(prompt + answer.token_ids)
    assert scores[len(prompt) :] == pytest.approx(answer.logprobs, abs=1e-4)


def test_score_gives_one_number_a_token(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode("import textwrap")
    of_text, of_ids = loaded.score("import textwrap"), loaded.score([loaded.tokenizer.bos_id, *ids])
    assert len(of_text) == len(ids)
    assert [None, *of_text] == of_ids
    logits = loaded.logits(torch.tensor([[loaded.tokenizer.bos_id, *ids]]))
    assert logits.shape == (1, len(ids) + 1, loaded.config.vocab_size)
    expected = logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).flatten()
    assert of_text == pytest.approx(expected.tolist(), abs=1e-4)
    assert loaded.score([40]) == [None]
    assert trinity.load is load


def test_chat_and_stream_agree(loaded: LoadedModel) -> None:
    messages = [{"role": "user", "content": "What is a paragraph?"}]
    answer = loaded.chat(messages, max_new_tokens=12, temperature=0.8, seed=4)
    sampling = SamplingParams(max_new_tokens=12, temperature=0.8, seed=4)
    pieces = list(loaded.stream(loaded.chat_prompt(messages), sampling))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert pieces[-1].finish_reason == answer.finish_reason
    other = loaded.chat(messages, max_new_tokens=12, temperature=0.8, seed=5)
    assert other.token_ids != answer.token_ids


def test_bfloat16_keeps_what_decides_routing_in_float32(folder: Path, loaded: LoadedModel) -> None:
    half, opened = load(folder, dtype="bfloat16"), open_model(folder, "bfloat16").model
    kept = ("expert_bias", "router.gate.weight", "norm.weight", "layernorm.weight")
    for name, tensor in opened.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.endswith(kept) else torch.bfloat16), name
    biases = opened.expert_biases(), open_model(folder).model.expert_biases()
    assert all(torch.equal(a, b) for a, b in zip(*biases, strict=True))
    ids = torch.tensor([[0, *range(40, 60)]])
    assert half.logits(ids).dtype == torch.float32
    torch.testing.assert_close(half.logits(ids), loaded.logits(ids), rtol=0, atol=0.1)


@pytest.mark.skipif(not is_loaded(), reason="no C++ compiler here")
@pytest.mark.parametrize(("dtype", "off"), [("bfloat16", 0.1), ("int8", 0.6), ("int4", 4.0)])
def test_narrow_weights_answer_nearly_alike_in_less_memory(folder: Path, loaded: LoadedModel, dtype: str, off: float):
    narrow = load(folder, dtype=dtype)
    ids = torch.tensor([[0, *range(40, 60)]])
    torch.testing.assert_close(narrow.logits(ids), loaded.logits(ids), rtol=0, atol=off)
    assert narrow.runner.weight_bytes < 0.6 * loaded.runner.weight_bytes
    prompt = narrow.prompt("def wrap")
    answer = narrow.generate(prompt, max_new_tokens=8)
    tokens = [*prompt, *answer.token_ids]
    places = range(len(prompt) - 1, len(tokens) - 1)
    assert answer.token_ids == [int(narrow.logits([tokens])[0, place].argmax()) for place in places]


def test_narrow_keys_and_values_are_used_by_every_call(folder: Path, loaded: LoadedModel, capsys) -> None:
    narrow, ids = load(folder, kv_dtype="bfloat16"), [0, *range(40, 60)]
    assert narrow.engine().pools.paged.values.dtype == torch.bfloat16
    assert loaded.engine().pools.local.values.dtype == torch.float32
    assert not torch.equal(narrow.logits([ids]), loaded.logits([ids]))
    assert narrow.score(ids) != loaded.score(ids) and narrow.score(ids)[1:] == pytest.approx(
        loaded.score(ids)[1:], abs=0.1
    )
    main(["generate", str(folder), "--prompt", "def wrap", "--max-new-tokens", "4", "--kv-dtype", "bfloat16", "--json"])
    answer = narrow.generate("def wrap", max_new_tokens=4)
    assert json.loads(capsys.readouterr().out)["logprobs"] == answer.logprobs
    assert answer.logprobs != loaded.generate("def wrap", max_new_tokens=4).logprobs


def test_keys_and_values_are_as_wide_as_the_weights_where_nobody_says(folder: Path, loaded: LoadedModel) -> None:
    narrow, ids = load(folder, dtype="bfloat16"), [0, *range(40, 60)]
    assert narrow.engine().pools.local.values.dtype == torch.bfloat16
    assert torch.equal(narrow.logits([ids]), load(folder, dtype="bfloat16", kv_dtype="bfloat16").logits([ids]))
    assert torch.equal(loaded.logits([ids]), load(folder, kv_dtype="float32").logits([ids]))
    assert narrow.engine(EngineLimits(kv_dtype="float32")).pools.paged.values.dtype == torch.float32


@pytest.mark.skipif(not is_loaded(), reason="no C++ compiler here")
def test_weights_stored_in_bfloat16_stay_so_and_lose_nothing(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    narrow, ids = tmp_path / "narrow", [[0, *range(40, 60)]]
    shutil.copytree(folder, narrow)
    for file in narrow.glob("*.safetensors*"):
        file.unlink()
    write_hf(narrow, open_model(folder).model, torch.bfloat16)
    found, wide = load(narrow, kv_dtype="float32"), load(narrow, dtype="float32", kv_dtype="float32")
    assert found.runner.kv_dtype == "bfloat16" and wide.runner.kv_dtype == "float32"
    assert found.runner.weight_bytes < 0.6 * wide.runner.weight_bytes
    assert torch.equal(found.logits(ids), wide.logits(ids)) and not torch.equal(found.logits(ids), loaded.logits(ids))


def test_precisions_not_offered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="float16"):
        load(folder, dtype="float16")
    with pytest.raises(UsageError, match="kv_dtype is 'int8'. Choose auto or float32 or bfloat16"):
        load(folder, kv_dtype="int8")  # type: ignore[arg-type]
    monkeypatch.setattr("trinity.engine.loaded.is_loaded", lambda: False)
    with pytest.raises(UsageError, match="int8 needs the compiled kernels"):
        load(folder, dtype="int8")


def test_bad_calls(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load(tmp_path / "nowhere")
    with pytest.raises(RequestError, match=r"300 tokens.*256"):
        loaded.generate([40] * 300)
    for given in (None, ["def"], 7):
        with pytest.raises(RequestError, match="neither a text nor token ids"):
            loaded.generate(given)  # pyright: ignore[reportArgumentType]
    for given in ("hello", ["hello"]):
        with pytest.raises(RequestError, match="messages are not a list of turns"):
            loaded.chat(given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match="temprature"):
        loaded.generate("x", temprature=1.0)
    with pytest.raises(RequestError, match="batch, time"):
        loaded.logits(torch.tensor([1, 2]))
    with pytest.raises(RequestError, match="between 0 and"):
        loaded.logits(torch.tensor([[1, 99999]]))
    with pytest.raises(RequestError, match="empty"):
        loaded.score([])


def test_generate_command_holds_an_answer_to_a_form(folder: Path, tmp_path: Path, capsys) -> None:
    asked = ["generate", str(folder), "--prompt", "def wrap", "--max-new-tokens", "40"]
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"enum": [7]}')
    grammar.write_text('start: "yes" | "no"')
    assert main([*asked, "--json-schema", str(schema)]) == 0
    assert re.fullmatch(r"\s*7?\s*", capsys.readouterr().out)  # an untrained model may leave it at blanks
    assert main([*asked, "--regex", "[a-c]{3}"]) == 0
    assert re.fullmatch("[a-c]{3}\n", capsys.readouterr().out)
    assert main([*asked, "--grammar", str(grammar)]) == 0
    assert capsys.readouterr() in (("yes\n", ""), ("no\n", ""))
    for how in ("--stream", "--no-stream"):
        assert main([*asked, "--regex", "[a-c]{400}", how]) == 0
        shown = capsys.readouterr()
        assert re.fullmatch("[a-c]{40,399}\n", shown.out)
        assert shown.err.startswith("The answer was cut off at 40 tokens, before its form was whole. Give it more")
    for wrong, said in (
        (
            ["--grammar", str(tmp_path / "nowhere")],
            f"{tmp_path / 'nowhere'} cannot be read: No such file or directory. Give a text file.",
        ),
        (["--after-think"], "after_think is given without a form. Add one of json_schema, regex, grammar."),
        (["--regex", "("], "trinity generate: "),
    ):
        assert main([*asked, *wrong]) in (1, 2)
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1


def test_generate_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(*arguments: str) -> str:
        assert main(["generate", str(folder), "--max-new-tokens", "9", *arguments]) == 0
        return capsys.readouterr().out

    plain = shown("--prompt", "def wrap")
    assert shown("--prompt", "def wrap", "--stream") == plain
    monkeypatch.setattr("sys.stdin.read", lambda: "def wrap", raising=False)
    result = json.loads(shown("--prompt", "-", "--json"))
    for wrong in ("a\udcff", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")):
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin.read", Mock(side_effect=[wrong]), raising=False)
            assert main(["generate", str(folder), "--prompt", "-"]) == 2
        assert "Standard input is no text in UTF-8. Give --prompt - a text." in capsys.readouterr().err
    assert result["text"] + "\n" == plain
    assert len(result["token_ids"]) == len(result["logprobs"])
    warm = (
        "--prompt",
        "a",
        "--temperature",
        "1.2",
        "--seed",
        "3",
        "--top-p",
        "0.9",
        "--top-k",
        "40",
        "--min-p",
        "0.01",
    )
    assert shown(*warm) == shown(*warm)
    assert main(["generate", str(folder), "--prompt", "a", "--top-p", "2"]) == 1
    assert "top_p is 2" in capsys.readouterr().err
    assert main(["generate", str(folder), "--prompt", "word " * 400]) == 1
    assert "context holds 256" in capsys.readouterr().err


def test_chat_command_with_piped_lines(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["Hello", "", "And then?", "/reset", "Hello", "word " * 400, "Hello", "/quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    limits = ("--max-new-tokens", "6", "--temperature", "0", "--json")
    assert main(["chat", str(folder), *limits]) == 0
    captured = capsys.readouterr()
    turns = [json.loads(line) for line in captured.out.splitlines()]
    assert len(turns) == 4
    assert turns[0] == turns[2]
    assert "/reset starts anew" in captured.err


def test_logits_take_nested_lists_and_refuse_what_is_no_batch(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.testing.assert_close(loaded.logits([[40, 41, 42]]), loaded.logits(torch.tensor([[40, 41, 42]])))
    for wrong in ([1, 2, 3], "text", [[1, 2], [3]]):
        with pytest.raises(RequestError, match=r"\[batch, time\]"):
            loaded.logits(wrong)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="257 tokens are longer than the model's context of 256"):
        loaded.logits(torch.zeros(1, 257, dtype=torch.int64))
    monkeypatch.setattr("trinity.engine.loaded.available_bytes", lambda _: 1000)
    with pytest.raises(RequestError, match=r"Logits of 2 texts of 9 tokens take 36\.0 KiB; 1000 B are free"):
        loaded.logits(torch.zeros(2, 9, dtype=torch.int64))
