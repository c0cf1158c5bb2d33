"""From a text file to a served token: every stop of docs/walk.md, followed as written, and what each leaves.

`make walk` tells it while it goes. following.py carries out the page; here stands what must be true at each stop.
"""

import contextlib
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from following import PAGE, Walk, command, stops_of
from text_folder import DAMAGED, write_text_folder

from trinity.base.durable import unsealed_differences
from trinity.base.lineage import fingerprint, read_lineage
from trinity.base.run import read_lines
from trinity.ckpt.folder import newest_good, read_checkpoint
from trinity.ckpt.opened import open_model
from trinity.ckpt.shards import read_tensors
from trinity.data.documents import content_fingerprint, read_documents
from trinity.data.mix import open_corpus
from trinity.data.tokens import TokenFolder, TokenSplit
from trinity.model.loss import IGNORED

HERE = Path("walk")


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """The walk, in an empty folder that is the working directory while the tests of this module run."""
    with contextlib.chdir(tmp_path_factory.mktemp("walk")), Walk() as walk:
        yield walk


def ledger(folder: str) -> dict[str, str]:
    """Where -> which rule, of everything that was left out on the way to a documents folder."""
    return {line["source"].removeprefix("text/"): line["rule"] for line in read_lines(HERE / folder / "ledger.jsonl")}


def test_the_page_has_its_21_stops_and_each_can_be_looked_at():
    stops = stops_of(PAGE.read_text())
    assert list(stops) == list(range(1, 22))
    assert all(stop.blocks for number, stop in stops.items() if number != 9)


def test_01_a_text_file(walk: Walk, tmp_path: Path):
    names = walk.to(1)
    assert names["raw"].startswith(b"# textwrap\n")
    write_text_folder(tmp_path / "again")
    files = sorted(path.relative_to(HERE / "text") for path in (HERE / "text").rglob("*") if path.is_file())
    assert len(files) > 60
    assert all((tmp_path / "again" / file).read_bytes() == (HERE / "text" / file).read_bytes() for file in files)
    walk.tell(1, f"{len(files)} files, some of them broken; we follow one of {len(names['raw']):,} bytes.")


def test_02_a_document(walk: Walk):
    document = walk.to(2)["document"]
    assert document.text.encode() == walk.names["raw"]
    assert (document.kind, document.parents, len(document.id)) == ("docs", (), 64)
    left_out = ledger("documents")
    assert left_out == {where: rule for where, rule in DAMAGED.items() if "duplicate" not in rule}
    assert "left out: 1 broken JSON, 1 empty, 1 not UTF-8" in walk.said[2]
    for where in ("notes/old.txt:2", "questions.jsonl:4"):
        source = f"walk/text/{where.partition(':')[0]}"
        said = command("data", "ingest", source, "--out", "walk/strict", "--strict", code=1)
        assert f"{where.rpartition('/')[2]}: {DAMAGED[where]}" in said
    assert not (HERE / "strict").exists()
    walk.tell(2, f"its id is {document.id[:12]}...; {len(left_out)} files or lines were left out, each named.")


def test_03_a_curated_document(walk: Walk):
    curated = walk.to(3)["curated"]
    assert (curated.source, curated.copies) == ("text/guides/textwrap.md", 2)
    left_out = ledger("curated")
    for where in ("guides/wrapping-again.md", "notes/log.txt"):
        assert left_out[where] == DAMAGED[where]
    assert read_lineage(HERE / "curated")["parents"] == {"documents": content_fingerprint(HERE / "documents")}
    assert unsealed_differences(HERE / "curated") == []
    walk.tell(3, f"it stays, once for its {curated.copies} copies; {len(left_out)} others left, each with its rule.")


def test_04_a_rewritten_document(walk: Walk):
    child = walk.to(4)["child"]
    assert child.parents == (walk.names["curated"].id,) and child.source == walk.names["curated"].source
    assert 0.5 < len(child.text) / len(walk.names["curated"].text) < 1
    assert ledger("distilled")["guides/heapq.md"] == "rewrite: new_numbers"
    originals = {document.id for document in read_documents(HERE / "curated")}
    assert all(document.root in originals for document in read_documents(HERE / "distilled"))
    report = json.loads((HERE / "distilled" / "report.json").read_text())
    assert report["segments_accepted"] > report["segments_rejected"] >= 1 and report["cache_hits"] == 0
    again = command("data", "rewrite", "walk/curated", "--endpoint", f"http://{walk.addresses['127.0.0.1:8001']}/v1",
                    "--model", "stand-in", "--limit", "41", "--out", "walk/distilled", "--json")  # fmt: skip
    assert json.loads(again)["requests"] == 0, "every answer is in the cache"
    walk.tell(4, f"{report['token_ratio']:.0%} of the tokens remain; an answer that invented a number stays out.")


def test_05_a_token_document(walk: Walk):
    ids = walk.to(5)["ids"]
    folder, tokenizer = walk.names["tokens"], walk.names["tokens"].tokenizer
    assert ids.dtype == "uint16" and (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode(ids.tolist()) == walk.names["curated"].text
    assert folder.train.num_documents + folder.heldout.num_documents == len(list(read_documents(HERE / "curated")))
    parents = read_lineage(HERE / "tokens")["parents"]
    assert parents == {"documents": content_fingerprint(HERE / "curated"), "tokenizer": tokenizer.fingerprint}
    side = "held out" if walk.names["split"] is folder.heldout else "for training"
    walk.tell(5, f"{len(ids):,} ids, {len(walk.names['raw']) / len(ids):.2f} bytes each, {side}.")


def roots_of(split: TokenSplit) -> list[str]:
    """The id of the original that each document of a split descends from."""
    described = zip(split.described("id"), split.described("parents"), strict=True)
    return [parents[-1] if parents else id for id, parents in described]


def test_06_a_chosen_source(walk: Walk):
    drawn = walk.to(6)["order"].tokens_drawn
    corpus, distilled = walk.names["corpus"], TokenFolder.open(HERE / "tokens-distilled")
    longest = max(int(source.train.lengths.max()) for source in corpus.sources)
    assert abs(drawn[0] - 0.8 * sum(drawn)) <= longest, "shares hold in tokens, to one document"
    folders = (walk.names["tokens"], distilled)
    trained_on = {root for folder in folders for root in roots_of(folder.train)}
    held_out = {root for folder in folders for root in roots_of(folder.heldout)}
    assert trained_on and held_out and not trained_on & held_out, "a text and what was made from it are on one side"
    parents = read_lineage(HERE / "mix")["parents"]
    assert parents == {f"tokens:../{source.path.name}": source.fingerprint for source in corpus.sources}
    walk.tell(6, f"after 50 documents {drawn[0] / sum(drawn):.0%} of the tokens came from the originals.")


def test_07_an_entry_in_the_rsdb(walk: Walk):
    rows = walk.to(7)["rows"]
    assert all(sum(segment.stop - segment.start for segment in row) == 128 for row in rows)
    buffer = walk.names["buffer"]
    assert 16 <= buffer.live <= 32
    assert json.loads(json.dumps(buffer.state())) == buffer.state()
    visited = {segment.document for row in rows for segment in row}
    walk.tell(7, f"8 rows of 128 tokens from {len(visited)} of {buffer.live} live documents; their heads advanced.")


def test_08_a_batch(walk: Walk):
    batch = walk.to(8)["batch"]
    assert {tensor.dtype for tensor in batch} == {torch.int64}
    assert {tuple(tensor.shape) for tensor in batch} == {(4, 128)}
    inside = (batch.document_ids[:, 1:] == batch.document_ids[:, :-1]) & (batch.targets[:, :-1] != IGNORED)
    assert torch.equal(batch.targets[:, :-1][inside], batch.tokens[:, 1:][inside])
    ends = int((batch.targets == IGNORED).sum())
    walk.tell(8, f"3 tensors [4, 128]; {ends} positions end a document and have no target.")


def test_09_the_slice_of_this_process(walk: Walk):
    walk.to(9)
    walk.tell(9, "one process, so the whole batch.")


def test_10_hidden_states_and_a_routing(walk: Walk):
    output = walk.to(10)["output"]
    routing = walk.names["routing"]
    assert output.hidden.shape == (4, 128, 64) and len(output.routings) == 3
    assert routing.chosen.shape == (512, 2) and routing.counts().sum() == 1024
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((512,), walk.names["config"].model.route_scale))
    walk.tell(10, f"[4, 128, 64]; the first sparse layer sent its tokens to experts {routing.counts().tolist()}.")


def test_11_a_loss(walk: Walk):
    nats = float(walk.to(11)["cross_entropy"])
    assert abs(nats - math.log(512)) < 0.5
    assert float(walk.names["loss"].detach()) > nats, "the z-loss is in it"
    walk.tell(11, f"{nats:.3f} nats for each of {walk.names['targets']} targets, where ln 512 is {math.log(512):.3f}.")


def test_12_an_update(walk: Walk):
    measured = walk.to(12)["measured"]
    assert measured.counts.shape == (3, 8) and (measured.counts.sum(-1) == 2 * 1024).all()
    biases = torch.stack(walk.names["state"].model.expert_biases())
    assert biases.dtype == torch.float32
    busy, idle = measured.counts.argmax(-1), measured.counts.argmin(-1)
    layer = torch.arange(3)
    assert (biases[layer, busy] < 0).all() and (biases[layer, idle] > 0).all()
    walk.tell(12, f"gradient norm {measured.grad_norm:.2f}; biases moved by up to {biases.abs().max():.4f}.")


def test_13_a_checkpoint(walk: Walk):
    names = walk.to(13)
    run = HERE / "run"
    assert names["first"]["loss"] == names["measured"].loss, "the step made by hand was the run's first, to the bit"
    checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
    assert checkpoints == {"latest", "pre-anneal", "base", "step-00000024", "step-00000032"}
    assert newest_good(run, pytest.fail) == run / "checkpoints" / "step-00000032"
    state = names["checkpoint"].state
    assert (state["step"], state["tokens"], state["data_fingerprint"]) == (32, 32768, names["corpus"].fingerprint)
    assert read_checkpoint(run / "checkpoints" / "pre-anneal").state["step"] == 24, "before the rate falls"
    assert read_lineage(run)["parents"]["data"] == names["corpus"].fingerprint
    lines = list(read_lines(run / "metrics.jsonl"))
    bits = [line["bits_per_byte"] for line in lines if line["kind"] == "evaluation"]
    assert bits[-1] < bits[0] - 0.5, "and it learns"
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    again = command("train", "debug", "--data", "walk/mix", "--out", "walk/run",
                    "--set", "train.tokens=32768", "--set", "optim.decay_tokens=8192")  # fmt: skip
    assert "nothing to do" in again
    assert before == {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    walk.tell(13, f"32 steps, {bits[0]:.2f} -> {bits[-1]:.2f} bits per byte on held-out text; every file is sealed.")


def test_14_an_audited_model(walk: Walk):
    walk.to(14)
    found = json.loads((HERE / "audit" / "results.json").read_text())
    assert unsealed_differences(HERE / "audit") == []
    assert found["model"] == "run-pre-anneal" and found["trained_on_data"] is True
    assert {result["probe"] for result in found["results"]} == {"bits_per_byte", "memorisation", "routing"}
    assert all(result["low"] <= result["high"] and result["seed"] == 0 for result in found["results"])
    overall = next(r for r in found["results"] if r["probe"] == "bits_per_byte" and r["of"]["kind"] == "all")
    assert 2 < overall["low"] <= overall["value"] <= overall["high"] < 8
    walk.tell(14, f"{len(found['results'])} numbers with intervals; bits per byte {overall['value']:.2f} "
                  f"[{overall['low']:.2f}, {overall['high']:.2f}].")  # fmt: skip


def test_15_a_released_model(walk: Walk, tmp_path: Path):
    names = walk.to(15)
    assert "15 files are as they were signed" in walk.said[15]
    made_of = read_lineage(HERE / "truebase")["parents"]
    assert made_of["lineage"] == read_lineage(HERE / "run"), "the release names the run, the run its data"
    assert (HERE / "keys" / "me.pem").stat().st_mode & 0o077 == 0
    scale = names["ours"].logits(names["probe"]).abs().max()
    assert type(names["theirs"]).__name__ == "AfmoeForCausalLM" and names["difference"] <= 1e-5 * scale
    trained = read_tensors(HERE / "run" / "checkpoints" / "pre-anneal" / "model")
    assert all(
        torch.equal(trained[name], tensor) for name, tensor in open_model(HERE / "truebase").model.state_dict().items()
    )

    shutil.copytree(HERE / "truebase", tmp_path / "truebase")
    weights = tmp_path / "truebase" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = command("verify", tmp_path / "truebase", "--key", "walk/keys/me.pem.pub", code=1)
    assert "model.safetensors was altered" in said
    walk.tell(15, f"signed and verified; one flipped bit is named; transformers differs by {names['difference']:.0e}.")


def test_15_the_release_in_the_hand(walk: Walk):
    """trinity.load: generate, score and logits of the same folder agree with each other."""
    ours = walk.to(15)["ours"]
    text = "def dedent(text):"
    ids = torch.tensor([list(ours.prompt(text))])
    logprobs = ours.logits(ids)[0].log_softmax(-1)
    scored = ours.score(text)
    assert len(scored) == ids.shape[1] - 1
    expected = logprobs[:-1].gather(-1, ids[0, 1:, None]).flatten()
    torch.testing.assert_close(torch.tensor(scored), expected, rtol=0, atol=1e-4)
    generated = ours.generate(text, max_new_tokens=4)
    if generated.token_ids:
        assert generated.token_ids[0] == int(logprobs[-1].argmax())
        assert generated.logprobs[0] == pytest.approx(float(logprobs[-1].max()), abs=1e-4)
    assert generated.finish_reason in ("length", "stop")


def test_16_an_aligned_model(walk: Walk):
    walk.to(16)
    losses = [line["loss"] for line in read_lines(HERE / "chat" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    lineage = read_lineage(HERE / "chat")
    assert lineage["parents"]["model_lineage"] == fingerprint(read_lineage(HERE / "truebase"))
    before, after = (read_tensors(HERE / name) for name in ("truebase", "chat"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.endswith("expert_bias") for name in moved)
    audited = json.loads((HERE / "audit-chat" / "results.json").read_text())
    assert audited["model"] == "chat" and audited["results"]
    walk.tell(16, f"{losses[0]:.3f} -> {losses[-1]:.3f} nats for each token of an answer; audited again.")


def test_17_a_loaded_engine(walk: Walk):
    engine = walk.to(17)["engine"]
    assert engine.runner is walk.names["chat"].runner, "one set of weights"
    assert walk.names["chat"].end_ids == {walk.names["chat"].tokenizer.eos_id, walk.names["chat"].tokenizer.im_end_id}
    walk.tell(17, f"{engine.limits.max_active} places, room for {engine.pools.tokens} tokens.")


def test_18_to_20_from_a_request_to_its_tokens(walk: Walk):
    """One test for three stops: the page goes on with the same engine."""
    names = walk.to(18)
    request, tokenizer = names["request"], names["chat"].tokenizer
    assert names["engine"].busy and names["request_id"] == 0
    assert request.prompt[:2] == (tokenizer.bos_id, tokenizer.im_start_id)
    assert tokenizer.decode(request.prompt) == "user\nWhat does textwrap.dedent do?\nassistant\n"
    walk.tell(18, f"{len(request.prompt)} ids, the assistant's turn left open.")
    sequence = walk.to(19)["sequence"]
    if sequence is not None:
        assert sequence.read == len(request.prompt) and sequence.pages and names["engine"].kv_bytes() > 0
        assert len(sequence.answer) == 1
    walk.tell(19, "its prompt was read in one step.")
    new_ids = walk.to(20)["new_ids"]
    assert new_ids == names["oracle"] == names["chat"].generate(request.prompt, max_new_tokens=16).token_ids
    assert not names["engine"].busy and names["engine"].kv_bytes() == 0, "an answer that ended holds nothing"
    walk.tell(20, f"{len(new_ids)} tokens, the very ones of the oracle without a cache.")


def test_21_a_served_token(walk: Walk):
    names = walk.to(21)
    alone = names["chat"].generate("def ", max_new_tokens=12)
    assert "".join(names["served"]) == alone.text
    message = names["answer"].choices[0].message
    assert message.role == "assistant" and message.content == names["chat"].tokenizer.decode(names["new_ids"])
    assert names["answer"].usage.prompt_tokens == len(names["request"].prompt)
    shown = next(itertools.dropwhile(lambda text: not text, names["served"]), "")
    walk.tell(21, f"{shown!r}, the first of {len(names['served'])} events of a stream.")


def test_22_the_page(walk: Walk):
    walk.to(21)
    page = (HERE / "page.html").read_text()
    assert page.startswith("<!doctype html>") and "bits per byte" in page.lower()
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page
    print(f"\n  The run on one page: {len(page) / 1024:.0f} KiB, nothing fetched from elsewhere.")


def test_a_walk_stops_where_it_fails():
    """A stop that fails ends the walk there, and the stops after it say which one it was."""
    other = Walk()
    other.stops[1] = other.stops[1]._replace(blocks=[("python", "1 / 0")])
    with pytest.raises(ZeroDivisionError):
        other.to(1)
    with pytest.raises(pytest.fail.Exception, match="ended at stop 1"):
        other.to(2)


def test_the_fingerprints_lead_back_to_the_text(walk: Walk):
    """From the release to the text: every folder names its parent by content."""
    walk.to(15)
    run = read_lineage(HERE / "truebase")["parents"]["lineage"]
    corpus = open_corpus(HERE / "mix")
    assert run["parents"]["data"] == corpus.fingerprint
    originals = next(source for source in corpus.sources if source.path.name == "tokens")
    assert read_lineage(originals.path)["parents"]["documents"] == content_fingerprint(HERE / "curated")
    assert read_lineage(HERE / "documents")["parents"] == {"sources": ["walk/text"]}
