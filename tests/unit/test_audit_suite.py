"""The whole `base` suite on a model folder, through the command; bad input; every setting does something."""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from trinity.audit.passages import candidates, cut_to_bytes, heldout_texts, strata
from trinity.audit.report import render
from trinity.audit.suite import run_suite
from trinity.base.durable import verify_seal
from trinity.base.errors import ConfigError, DataError, UsageError
from trinity.ckpt.hf import write_hf
from trinity.ckpt.opened import open_model
from trinity.cli.audit import configure
from trinity.config.audit import AuditConfig
from trinity.data.documents import Document, read_documents, writing_documents
from trinity.data.mix import open_corpus
from trinity.data.tokenise import tokenise
from trinity.model.init import build_model
from trinity.recipes.table import recipe
from trinity.text.train_bpe import train_bpe

QUICK = AuditConfig(
    documents_per_kind=6, bytes_per_document=300, prompts_per_stratum=6, prefix_tokens=8, suffix_tokens=8,
    bootstrap_samples=50,
)  # fmt: skip


def some_text(number: int, kind: str) -> str:
    word = "value" if kind == "code" else "wörter"
    return " ".join(f"{word}{(number * 7 + i) % 23} = {i}" if kind == "code" else f"{word} {i}" for i in range(60, 120))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `tokens`, a model `model` with the same tokenizer, and `other`, tokens of another tokenizer."""
    place = tmp_path_factory.mktemp("audit")
    with writing_documents(place / "documents", {}, {}) as (writer, _):
        for number in range(60):
            kind = ("code", "prose")[number % 2]
            text = f"{number}: {some_text(number, kind)}"
            writer.write(Document(text, f"{number}.txt", kind, copies=(1, 1, 3, 9)[number % 4]))
    texts = [document.text for document in read_documents(place / "documents")]
    tokenizer = train_bpe(texts, 400)
    tokenise(place / "documents", tokenizer, place / "tokens", heldout_fraction=0.3)
    tokenise(place / "documents", train_bpe(texts, 300), place / "other")
    (place / "model").mkdir()
    write_hf(place / "model", build_model(dataclasses.replace(recipe("debug").model, num_hidden_layers=3), 0))
    tokenizer.save(place / "model")
    return place


def command(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    configure(parser)
    options = parser.parse_args([str(argument) for argument in arguments])
    options.action(options)


def quick_settings() -> list[str]:
    return [part for name, value in vars(QUICK).items() for part in ("--set", f"{name}={value}")]


def test_the_base_suite_leaves_every_number_with_interval_seed_and_command(place, tmp_path, capsys):
    out = tmp_path / "out"
    command(place / "model", "--data", place / "tokens", "--out", out, *quick_settings(), "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "results.json").read_text())
    verify_seal(out)
    assert {r["probe"] for r in printed["results"]} == {"bits_per_byte", "memorisation", "routing"}
    for r in printed["results"]:
        assert r["low"] <= r["value"] <= r["high"], r
        assert r["n"] > 0 and r["unit"] and r["seed"] == 0 and r["command"].startswith("trinity audit")
    assert {r["of"]["copies"] for r in printed["results"] if r["probe"] == "memorisation"} == {
        "1", "2-3", "8+", "held-out",
    }  # fmt: skip
    assert {r["of"]["kind"] for r in printed["results"] if r["probe"] == "bits_per_byte"} == {"code", "prose", "all"}
    layers = {entry["layer"] for entry in json.loads((out / "load_shares.json").read_text())}
    assert layers == {0, 1}
    report = (out / "report.md").read_text()
    assert "## Bits per byte" in report and "| held-out |" in report and "code and prose" in report
    assert "nan" not in report


def test_a_second_audit_replaces_the_first_and_prints_tables(place, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):
        command(place / "model", "--data", place / "tokens", "--out", out, *quick_settings())
    said = capsys.readouterr().out
    assert "| kind | bits per byte | documents |" in said and "report.md" in said


def test_the_report_says_whether_the_model_was_trained_on_this_data(place):
    corpus = open_corpus(place / "tokens")
    for data, known, says in (
        (None, None, "does not say what it was trained on"),
        ("another", False, "names other training data"),
        (corpus.fingerprint, True, ""),
    ):
        opened = dataclasses.replace(open_model(place / "model"), lineage={"parents": {"data": data}} if data else {})
        found = run_suite("base", opened, corpus, QUICK, command="x", watch=lambda *seen: None)
        assert found.trained_on_data is known
        report = render(found.as_json(), found.load_shares)
        assert says in report and ("lineage" in report) == (known is not True)


def test_a_run_that_holds_its_data_needs_no_other(place, tmp_path, capsys):
    shutil.copytree(place / "model", tmp_path / "run")
    shutil.copytree(place / "tokens", tmp_path / "run" / "data")
    command(tmp_path / "run", "--out", tmp_path / "out", *quick_settings())
    assert "| code |" in capsys.readouterr().out


def test_equal_seeds_give_equal_results(place):
    first, second = (run(place, QUICK) for _ in range(2))
    assert first == second


def run(place: Path, config: AuditConfig, context: int | None = None) -> list:
    opened, corpus = open_model(place / "model"), open_corpus(place / "tokens")
    found = run_suite("base", opened, corpus, config, command="x", watch=lambda *seen: None, context=context)
    return [measure.as_json() for measure in found.measures]


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1}, {"documents_per_kind": 3}, {"bytes_per_document": 100}, {"prompts_per_stratum": 3},
        {"prefix_tokens": 4}, {"suffix_tokens": 1}, {"bootstrap_samples": 51}, {"confidence": 0.5},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_every_setting_changes_what_is_found(place, changed):
    config = dataclasses.replace(QUICK, **changed)
    if "suffix_tokens" in changed or "prefix_tokens" in changed:  # an untrained model extracts nothing at any length
        corpus = open_corpus(place / "tokens")
        before, after = strata(corpus, QUICK)[0].passages, strata(corpus, config)[0].passages
        assert before.shape[1] - after.shape[1] == 16 - config.prefix_tokens - config.suffix_tokens
    else:
        assert run(place, config) != run(place, QUICK)


def test_a_shorter_context_reads_the_same_text_with_less_past(place):
    long, short = run(place, QUICK), run(place, QUICK, context=16)
    assert [r["n"] for r in long] == [r["n"] for r in short]
    assert long[0]["value"] != short[0]["value"]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ([], UsageError, "--data"),
        (["--data", "other"], DataError, "another tokenizer"),
        (["--data", "documents"], DataError, "not a tokens folder"),
        (["--data", "tokens", "--suite", "bass"], UsageError, "base"),
        (["--data", "tokens", "--context", "9999"], UsageError, "9999"),
        (["--data", "tokens", "--set", "prompts=3"], ConfigError, "prompts_per_stratum"),
        (["--data", "tokens", "--set", "confidence=1.5"], ConfigError, "confidence"),
        (["--data", "tokens", "--set", "bootstrap_samples=1"], ConfigError, "bootstrap_samples"),
        (["--data", "tokens", "--set", "suffix_tokens=0"], ConfigError, "suffix_tokens"),
        (["--data", "tokens", "--set", "prefix_tokens=600"], UsageError, "600"),
    ],
)
def test_what_cannot_be_audited_ends_in_one_clear_message(place, tmp_path, arguments, error, says):
    folders = {"other", "documents", "tokens"}
    arguments = [str(place / word) if word in folders else word for word in arguments]
    with pytest.raises(error, match=says) as raised:
        command(place / "model", "--out", tmp_path / "out", *arguments)
    assert raised.value.remedy and not (tmp_path / "out").exists()


def test_a_folder_that_is_no_audit_is_not_replaced(place, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="not an audit"):
        command(place / "model", "--data", place / "tokens", "--out", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_documents_too_short_for_a_passage_are_said_so(place, tmp_path):
    command(place / "model", "--data", place / "tokens", "--out", tmp_path / "out", *quick_settings(),
            "--set", "prefix_tokens=250", "--set", "suffix_tokens=250")  # fmt: skip
    assert "No document is long enough" in (tmp_path / "out" / "report.md").read_text()


def test_a_text_occurs_as_often_as_it_stands_in_the_corpus_times_its_copies(tmp_path):
    texts = {name: f"{name} {some_text(number, 'prose')}" for number, name in enumerate(["once", "twice", "dropped"])}
    with writing_documents(tmp_path / "documents", {}, {}) as (writer, _):
        for name, copies in (("once", 1), ("twice", 1), ("twice", 1), ("dropped", 4), ("dropped", 5)):
            writer.write(Document(texts[name], name, "prose", copies=copies))
    tokenise(tmp_path / "documents", train_bpe(texts.values(), 400), tmp_path / "tokens", heldout_fraction=0.0)
    corpus = open_corpus(tmp_path / "tokens")
    found = {name: [corpus.sources[0].train.sources[i] for i in own] for name, own in candidates(corpus, 16).items()}
    assert found == {"1": ["once"], "2-3": ["twice"], "8+": ["dropped"]}


def test_held_out_text_is_cut_at_bytes_and_counted_exactly(place):
    corpus = open_corpus(place / "tokens")
    texts = heldout_texts(corpus, corpus.tokenizer, QUICK)
    assert {text.kind for text in texts} == {"code", "prose"}
    for text in texts:
        assert text.bytes == len(corpus.tokenizer.decode_bytes(text.ids)) <= 300
    ids = corpus.tokenizer.encode("hello wörld")
    assert cut_to_bytes(ids, corpus.tokenizer, 10**6) == (ids, 12)
    assert len(cut_to_bytes(ids, corpus.tokenizer, 1)[0]) == 1


def test_passages_come_from_training_text_and_the_control_from_held_out_text(place):
    corpus = open_corpus(place / "tokens")
    trained = " ".join(corpus.tokenizer.decode(corpus.document(i).tolist()) for i in range(corpus.num_documents))
    for stratum in strata(corpus, QUICK)[:-1]:
        for passage in stratum.passages:
            assert corpus.tokenizer.decode(passage.tolist()) in trained
    heldout = " ".join(document.text for document in corpus.heldout())
    for passage in strata(corpus, QUICK)[-1].passages:
        assert corpus.tokenizer.decode(passage.tolist()) in heldout
