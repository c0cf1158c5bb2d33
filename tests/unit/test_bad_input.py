"""Every bad input ends in one clear line with a remedy and the right exit code, and loses nothing that was saved."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from trinity.base.durable import unsealed_differences
from trinity.ckpt import hf
from trinity.ckpt.shards import read_tensors
from trinity.cli.main import main

SETTINGS = ["train.tokens=6K", "train.save_every_tokens=2048", "train.evaluate_bytes=300", "train.sample_tokens=0",
            "train.batch_tokens=1000", "train.microbatch_rows=2", "data.sequence_length=100",
            "optim.warmup_tokens=1K", "optim.decay_tokens=1K"]  # fmt: skip
CHAT = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}) + "\n"

Trinity = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trinity(capsys) -> Trinity:
    """trinity(*arguments) -> (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse's own mistakes
            code = ended.code
        captured = capsys.readouterr()
        return int(code or 0), captured.out, captured.err

    return run


@pytest.fixture
def refused(trinity: Trinity) -> Callable[..., str]:
    """refused(code, what, *arguments): the command ends with `code` and one line of error holding `what`."""

    def check(code: int, what: str, *arguments: object) -> str:
        ended, out, error = trinity(*arguments)
        lines = [line for line in error.splitlines() if line.strip()]
        assert ended == code, error
        assert out == "" and len(lines) == 1 and lines[0] == error.rstrip("\n"), error
        assert what in error, error
        assert lines[0].startswith("trinity") and lines[0].endswith(("?", ".")), "a sentence"
        assert error.count(". ") >= 1, "what happened, and what to do"
        assert "Traceback" not in error and "unexpected" not in error
        return error

    return check


@pytest.fixture(scope="module")
def finished(debug_data: Path, tmp_path_factory) -> Path:
    """A finished run of six steps with checkpoints at steps 3, 5 and 6."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main(training(debug_data, run)) == 0
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == ["step-00000005", "step-00000006"]
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def training(data: Path, run: Path, *more: str) -> list[str]:
    settings = [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
    return ["train", "debug", "--data", str(data), "--out", str(run), *settings]


@pytest.mark.parametrize(
    ("command", "code", "what"),
    [
        ("trian debug", 2, "unknown command 'trian'. Did you mean 'train'?"),
        ("train", 2, "required: RECIPE"),
        ("train debug", 2, "--out --write-recipe is required"),
        ("train debug --out r --frobnicate", 2, "--frobnicate"),
        ("train debgu --out r", 2, "Unknown recipe 'debgu'. Did you mean 'debug'?"),
        ("train xyzzy --out r", 2, "Known: debug, demo"),
        ("train debug --out r --set train.tokns=5", 2, "Unknown key 'train.tokns'. Did you mean 'tokens'?"),
        ("train debug --out r --set trian.tokens=5", 2, "Unknown key 'trian.tokens'. Did you mean 'train'?"),
        ("train debug --out r --set train.tokens.more=5", 2, "'train.tokens' holds a single value"),
        ("train debug --out r --set train=5", 2, "'train' is a section"),
        ("train debug --out r --set train.tokens", 2, "'train.tokens' is not a setting"),
        ("train debug --out r --set train.tokens=many", 2, "'many'"),
        ("train debug --out r --set train.tokens=1.5", 2, "1.5"),
        ("train debug --out r --set optim.muon_lr=fast", 2, "'fast'"),
        ("train debug --out r --set train.spike_action=skp", 2, "Did you mean 'skip'?"),
        ("train debug --out r --set train.tokens=0", 2, "train.tokens is 0"),
        ("train debug --out r --set data.sequence_length=1000", 2, "whole number of microbatches"),
        ("train debug --out r --data nowhere", 1, "nowhere is not a folder"),
        ("train debug --out r --data empty", 1, "empty is not a tokens folder"),
        ("train debug --out notes.txt", 2, "notes.txt is a file"),
        ("plan nanoo", 2, "Did you mean 'nano'?"),
        ("data ingest nowhere --out d", 1, "nowhere does not exist"),
        ("data ingest empty --out d", 1, "nothing to ingest in empty"),
        ("data ingest latin.txt --out d", 1, "latin.txt:2"),
        ("data ingest lines.jsonl --out d --strict", 1, "lines.jsonl:2: broken JSON"),
        ("data ingest image.png --out d", 1, "not a kind of file"),
        ("data curate empty --out d", 1, "empty is not a documents folder"),
        ("data inspect nowhere", 1, "nowhere does not exist"),
        ("tokenizer train nowhere --vocab-size 300 --out d", 1, "nowhere is not a folder"),
        ("align sft nowhere --data chat.jsonl --out d", 1, "no model folder at nowhere"),
        ("align sft empty --data chat.jsonl --out empty", 2, "empty exists"),
        ("align sft empty --data chat.jsonl --out d --set epoch=1", 2, "Did you mean 'epochs'?"),
        ("align grpp empty", 2, "grpp"),
        ("generate nowhere --prompt a", 1, "no model folder at nowhere"),
        ("generate empty --prompt a", 1, "empty is not a model"),
        ("generate notes.txt --prompt a", 1, "notes.txt is a file, not a model"),
        ("generate empty", 2, "required: --prompt"),
        ("generate empty --prompt a --max-new-tokens many", 2, "invalid int value: 'many'"),
        ("generate empty --prompt a --temperature -1", 1, "temperature is -1"),
        ("generate empty --prompt a --dtype float16", 2, "invalid choice: 'float16'"),
        ("chat notes.txt", 1, "notes.txt is a file, not a model"),
        ("serve empty --port 0", 1, "empty is not a model"),
        ("import nowhere d", 1, "There is no folder nowhere"),
        ("import empty d", 1, "empty has no config.json"),
        ("import notes.txt d", 1, "notes.txt"),
        ("export notes.txt d", 1, "notes.txt is a file, not a model"),
        ("export empty empty", 2, "empty exists"),
        ("export empty d --dtype int3", 2, "invalid choice: 'int3'"),
        ("audit empty --out d", 2, "was given neither"),
        ("release empty --out d", 2, "--key --new-key is required"),
        ("verify nowhere", 2, "no folder at nowhere"),
        ("report nowhere --out page.html", 1, "no run folder at nowhere"),
    ],
)
def test_a_mistake_is_one_line(refused, tmp_path: Path, monkeypatch, command: str, code: int, what: str):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("notes.txt").write_text("A note.\n")
    Path("image.png").write_bytes(b"\x89PNG")
    Path("latin.txt").write_bytes(b"one\nd\xe9j\xe0\n")
    Path("lines.jsonl").write_text('{"text": "One line."}\n{"text": "\n{"text": "Another."}\n')
    Path("chat.jsonl").write_text(CHAT)
    before = sorted(path.name for path in tmp_path.iterdir())
    refused(code, what, *command.split())
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert [name for name in left if name not in ("r", ".lock")] == before, "nothing is written or left half written"


def test_broken_lines_are_skipped_counted_and_named(trinity, refused, debug_data, run, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(b'{"text": "One line."}\n{"text": "\n{"text": "\xff"}\n{"txt": "no"}\n{"text": "Last."}\n')
    code, out, error = trinity("data", "ingest", lines, "--out", tmp_path / "documents", "--json")
    told = json.loads(out)
    assert code == 0 and told["documents"] == 2 and sum(told["skipped"].values()) == 3, error
    ledger = (tmp_path / "documents" / "ledger.jsonl").read_text()
    assert all(f"lines.jsonl:{number}" in ledger for number in (2, 3, 4))
    chat = tmp_path / "chat.jsonl"
    chat.write_text(CHAT + '{"messages"\n' + CHAT)
    command = ["align", "sft", run, "--data", chat, "--set", "sequence_length=64", "--set", "batch_tokens=64"]
    code, out, error = trinity(*command, "--out", tmp_path / "tuned", "--json")
    assert code == 0 and json.loads(out)["skipped"] == 1
    assert error.startswith(f"skipped {chat}:2: ")
    refused(1, f"{chat}:2: ", *command, "--out", tmp_path / "strict", "--strict")
    chat.write_text('{"messages"\n')
    refused(1, f"{chat}:1: ", *command, "--out", tmp_path / "nothing")
    assert not (tmp_path / "strict").exists() and not (tmp_path / "nothing").exists()


def truncate(checkpoint: Path) -> None:
    os.truncate(next((checkpoint / "model").iterdir()), 1000)


def alter(checkpoint: Path) -> None:
    path = next((checkpoint / "model").iterdir())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, alter])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(
    trinity, refused, debug_data, finished, run, tmp_path, damage
):
    newest = run / "checkpoints" / "step-00000006"
    damage(newest)
    exported = []
    for source in (run, finished / "checkpoints" / "step-00000005"):
        code, _, error = trinity("export", source, tmp_path / f"out{len(exported)}")
        exported.append((tmp_path / f"out{len(exported)}" / "model.safetensors").read_bytes())
        assert code == 0 and error.count("\n") == (source == run)
        assert source != run or (str(newest) in error and "model/shard-00001" in error)
    assert exported[0] == exported[1]
    refused(1, f"{newest} is damaged", "generate", newest, "--prompt", "a")
    code, _, error = trinity(*training(debug_data, run))  # the same command goes on from step 5
    assert code == 0 and "step-00000006 is damaged" in error and "at step 5" in error
    again, last = (read_tensors(folder / "checkpoints" / "step-00000006" / "model") for folder in (run, finished))
    assert again.keys() == last.keys() and all(torch.equal(again[name], last[name]) for name in last)


def test_checkpoints_that_are_all_damaged_are_told(trinity, run):
    for checkpoint in (run / "checkpoints").glob("*-*"):
        truncate(checkpoint)
    code, out, error = trinity("generate", run, "--prompt", "a")
    assert code == 1 and out == "" and "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"trinity generate: Every checkpoint of {run} is damaged. Restore")
    assert len(error.splitlines()) == 3


def test_broken_model_folders_are_told(trinity, refused, run, tmp_path):
    assert trinity("export", run, tmp_path / "model")[0] == 0
    for name, content, what in (
        ("config.json", b"{", "config.json is not JSON"),
        ("model.safetensors", b"\0" * 100, "model.safetensors is cut off or altered"),
        ("tokenizer.json", b"{}", "tokenizer.json is not a tokenizer.json"),
    ):
        shutil.copytree(tmp_path / "model", tmp_path / "broken")
        (tmp_path / "broken" / name).write_bytes(content)
        if name != "config.json":  # which is read first of all
            promised = f"manifest.json promises: {name} has {len(content)} bytes"
            refused(1, promised, "generate", tmp_path / "broken", "--prompt", "a")
            (tmp_path / "broken" / "manifest.json").unlink()
        refused(1, what, "generate", tmp_path / "broken", "--prompt", "a")
        shutil.rmtree(tmp_path / "broken")


def test_a_prompt_longer_than_the_context_is_refused(refused, run):
    error = refused(1, "512", "generate", run, "--prompt", "word and " * 400)
    assert "context" in error


def no_space(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_told_by_the_library(*arguments, **keywords):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failure", [no_space, no_space_told_by_the_library])
def test_a_full_disk_loses_nothing_that_was_saved(trinity, refused, debug_data, run, tmp_path, monkeypatch, failure):
    newest = run / "checkpoints" / "step-00000006"
    shutil.rmtree(newest)
    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", no_space)
        code, out, error = trinity(*training(debug_data, run))
        assert code == 1 and "Traceback" not in error and "defect" not in error
        told = error.splitlines()[-1]
        assert (
            told.startswith(f"trinity train: The disk is full: writing {newest.with_name('base')} failed")
            and "Free some space" in told
        )
        assert sorted(path.name for path in newest.parent.iterdir()) == [
            "base",
            "latest",
            "pre-anneal",
            "step-00000005",
        ]
        assert not unsealed_differences(newest.parent / "step-00000005")
    with monkeypatch.context() as patch:
        patch.setattr(hf, "save_file", failure)
        refused(1, "The disk is full", "export", run, tmp_path / "model")
        (tmp_path / "chat.jsonl").write_text(CHAT)
        refused(1, "The disk is full", "align", "sft", run, "--data", tmp_path / "chat.jsonl", "--out", tmp_path / "c")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl", "run"]
    assert trinity(*training(debug_data, run))[0] == 0
    assert not unsealed_differences(newest)


def test_a_run_is_not_mixed_with_another(refused, trinity, debug_data, run):
    refused(2, "optim.muon_lr: 0.02 -> 0.5", *training(debug_data, run, "optim.muon_lr=0.5"))
    (run / "config.json").write_text("{")
    refused(2, "config.json does not hold the settings of a run", *training(debug_data, run))


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(refused, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(2, f"Cannot listen on 127.0.0.1:{port}", "serve", tmp_path, "--port", port)


def test_what_the_system_refuses_is_no_defect(refused, run, tmp_path):
    (tmp_path / "file").write_text("x")
    error = refused(1, "Not a directory", "export", run, tmp_path / "file" / "model")
    assert str(tmp_path / "file") in error and "Check that path" in error
