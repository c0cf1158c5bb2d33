"""Packed folders: opened as they were written, experts in memory or on the disk; what is wrong with one is said."""

import errno
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trinity.base import progress
from trinity.base.errors import CheckpointError, UsageError
from trinity.ckpt.model_folder import write_model_folder
from trinity.ckpt.opened import find_model, open_model
from trinity.ckpt.tensor_file import TensorFile, header_of
from trinity.ckpt.weights import PACKED
from trinity.cli.main import main
from trinity.engine import loaded
from trinity.engine.loaded import LoadedModel, load
from trinity.engine.packed import checksum, checksum_plainly, packed_bytes, write_packed
from trinity.engine.pages import Pools, pages_for
from trinity.engine.step import Rows
from trinity.engine.weights import Kind
from trinity.kernels.compiled import is_loaded
from trinity.model.init import build_model
from trinity.plan.inference import record_bytes
from trinity.recipes.table import recipe
from trinity.text.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not is_loaded(), reason="no C++ compiler here")
CONFIG = replace(recipe("debug").model, max_position_embeddings=256, num_experts=12)
EXPERTS = CONFIG.num_sparse_layers * CONFIG.num_experts
RECORD = {kind: record_bytes(CONFIG, kind) for kind in ("float32", "int4")}


@pytest.fixture(scope="module")
def models(debug_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole/, and packed in two kinds: float32/ and int4/."""
    place = tmp_path_factory.mktemp("packed")
    (place / "whole").mkdir()
    model = build_model(CONFIG, 4)
    for bias in model.expert_biases():
        bias.copy_(torch.linspace(-0.1, 0.1, len(bias)))
    write_model_folder(place / "whole", model, Tokenizer.load(debug_data), torch.float32, chat=True)
    for kind in RECORD:
        export(place / "whole", place / kind, kind)
    return place


def export(model: Path, out: Path, kind: str) -> None:
    assert main(["export", str(model), str(out), "--format", "packed", "--dtype", kind]) == 0


@pytest.fixture
def packed(models: Path, tmp_path: Path) -> Path:
    """A copy of the float32 folder that a test may damage; without a manifest, which would tell of any other size."""
    shutil.copytree(models / "float32", tmp_path / "packed")
    (tmp_path / "packed" / "manifest.json").unlink()
    return tmp_path / "packed"


def logits(model: LoadedModel) -> torch.Tensor:
    tokens = torch.randint(CONFIG.vocab_size, (1, 150), generator=torch.Generator().manual_seed(1))
    return model.logits(tokens)


@pytest.mark.parametrize("kind", RECORD)
def test_a_packed_folder_computes_what_the_model_it_was_made_of_does(models: Path, kind: Kind):
    whole, packed = load(models / "whole", kind), load(models / kind)
    assert torch.equal(logits(packed), logits(whole)) and packed.config == whole.config
    assert packed.end_ids == whole.end_ids and packed.generation == whole.generation
    assert packed.generate("def f", 8).text == whole.generate("def f", 8).text
    assert packed.runner.expert_reads() is None
    size = (models / kind / PACKED).stat().st_size
    assert packed_bytes(CONFIG, kind) < size < packed_bytes(CONFIG, kind) + 40_000


def test_any_reader_of_safetensors_opens_the_file(models: Path):
    with safe_open(models / "int4" / PACKED, framework="pt") as file:
        assert file.metadata() == {"format": "trinity-packed-1", "kind": "int4"}
        experts = file.get_tensor("layers.2.experts")
        assert experts.shape == (CONFIG.num_experts, RECORD["int4"])
    assert torch.equal(TensorFile(models / "int4" / PACKED).read("layers.2.experts"), experts)


@pytest.mark.parametrize("kind", RECORD)
@settings(max_examples=10)
@given(slots=st.integers(2, EXPERTS - 1), cuts=st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_experts_on_the_disk_change_no_bit(models: Path, kind: Kind, slots: int, cuts: list[int]):
    """Down to two experts of memory, where a prompt's layer goes through twelve in waves of one."""
    held, streamed = load(models / kind), load(models / kind, expert_bytes=slots * RECORD[kind])
    tokens = torch.randint(CONFIG.vocab_size, (150,), generator=torch.Generator().manual_seed(slots)).tolist()
    made, begun = [], time.perf_counter()
    for model in (held, streamed):
        pools = Pools(CONFIG, pages_for(150), 1, 90)
        pages, ring = pools.paged.take(pages_for(150)), pools.take_ring() or []
        parts, start, turn = [], 0, 0
        while start < len(tokens):
            part = tokens[start : start + cuts[turn % len(cuts)]]
            parts.append(model.runner.forward([Rows(part, start, pages, ring, len(part))], pools))
            start, turn = start + len(part), turn + 1
        made.append(torch.cat(parts))
    assert torch.equal(*made)
    assert torch.equal(held.runner.expert_rows, streamed.runner.expert_rows)
    reads = streamed.runner.expert_reads()
    assert reads is not None and reads.bytes == reads.misses * RECORD[kind]
    assert reads.stalled_seconds <= time.perf_counter() - begun
    assert reads.misses >= int((held.runner.expert_rows > 0).sum()), "each of them was read once at least"
    assert streamed.runner.weight_bytes == held.runner.weight_bytes - EXPERTS * RECORD[kind]


def test_a_budget_for_all_of_them_is_no_cache(models: Path):
    assert load(models / "float32", expert_bytes=EXPERTS * RECORD["float32"]).runner.expert_reads() is None
    assert load(models / "float32", expert_bytes="4GiB").runner.expert_reads() is None


def test_reading_shows_how_far_it_is_with_what_stays_on_the_disk_left_out(models: Path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    load(models / "int4")
    whole = capsys.readouterr().err.splitlines()
    load(models / "int4", expert_bytes=2 * RECORD["int4"])
    assert all(line.startswith("Reading int4: ") for line in whole)
    assert 3 < len(capsys.readouterr().err.splitlines()) < len(whole)


def test_what_tokens_choose_often_stays_in_memory(models: Path):
    """One text, again and again, between others: its experts are the hot ones, and half of all slots hold them."""
    model = load(models / "float32", expert_bytes=EXPERTS // 2 * RECORD["float32"])
    often, seldom = [[7] * 60], [[token, token + 1] for token in range(0, 200, 10)]
    for other in seldom:
        model.logits(often)
        model.logits([other])
    before = model.runner.expert_reads()
    model.logits(often)
    after = model.runner.expert_reads()
    assert before is not None and after is not None
    assert after.misses == before.misses and after.hits > before.hits


def test_many_threads_change_no_bit_either(models: Path):
    """More than there are cores, so that some come late to a phase, or wait for an expert together."""
    wanted, before = logits(load(models / "int4")), torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        for slots in (2, 3, 9):
            streamed = load(models / "int4", expert_bytes=slots * RECORD["int4"])
            assert all(torch.equal(logits(streamed), wanted) for _ in range(3))
    finally:
        torch.set_num_threads(before)


def test_a_process_that_forked_says_that_it_cannot_read(models: Path):
    model = load(models / "int4", expert_bytes=2 * RECORD["int4"])
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            logits(model)
        except RuntimeError as error:
            os._exit(7 if "after a fork" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -1e6])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_damaged_weights_are_not_rounded_to_sound_ones(models: Path, tmp_path: Path, kind: Kind, wrong: float):
    shutil.copytree(models / "whole", tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / "model.safetensors")
    tensors["model.layers.2.mlp.experts.3.up_proj.weight"][5, 3] = wrong
    save_file(tensors, tmp_path / "damaged" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"layers.2.mlp.experts has values from .* which {kind} cannot keep"):
        load(tmp_path / "damaged", kind)


def test_a_disk_without_room_is_met_before_the_work(models: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))  # type: ignore[attr-defined]
    assert main(["export", str(models / "whole"), str(tmp_path / "new" / "x"), "--format", "packed"]) == 2
    assert "1000 B are free there" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_packed_folder_goes_to_a_cpu_by_itself(models: Path, monkeypatch):
    monkeypatch.setattr(
        loaded, "device_named", lambda name: torch.device("cpu") if name == "cpu" else torch.device("cuda", 0)
    )
    assert load(models / "int4").runner.device.type == "cpu"
    with pytest.raises(UsageError, match="A packed folder is for CPUs alone. Use --device cpu"):
        load(models / "int4", device="cuda")


def test_a_file_that_is_removed_while_it_is_open_serves_on(models: Path, packed: Path):
    model = load(packed, expert_bytes=4 * RECORD["float32"])
    (packed / PACKED).unlink()
    assert torch.equal(logits(model), logits(load(models / "float32")))


def test_a_file_that_is_cut_off_while_it_is_open_is_said_and_may_come_back(models: Path, packed: Path):
    model, content = load(packed, expert_bytes=4 * RECORD["float32"]), (packed / PACKED).read_bytes()
    wanted = logits(load(models / "float32"))
    os.truncate(packed / PACKED, len(content) // 2)
    with pytest.raises(CheckpointError, match="packed.safetensors is shorter than it was"):
        logits(model)
    with pytest.raises(CheckpointError, match="shorter"):  # as long as it is
        logits(model)
    with (packed / PACKED).open("r+b") as file:  # the same file again, as a disk that comes back
        file.write(content)
    assert torch.equal(logits(model), wanted)


def test_bytes_that_have_changed_are_not_computed_with(packed: Path):
    streamed, start = load(packed, expert_bytes=4 * RECORD["float32"]), expert_start(packed)
    with (packed / PACKED).open("r+b") as file:
        file.seek(start + 100)
        file.write(b"\x01")
    with pytest.raises(CheckpointError, match="an expert's bytes have changed"):
        logits(streamed)
    with pytest.raises(CheckpointError, match=r"the bytes of layers.*\.experts have changed"):
        load(packed)


def expert_start(folder: Path) -> int:
    file = TensorFile(folder / PACKED)
    return next(stored.start for name, stored in file.tensors.items() if name.endswith(".experts"))


def test_a_tensor_that_every_token_needs_is_checked_too(packed: Path):
    stored = TensorFile(packed / PACKED).tensors["head"]
    with (packed / PACKED).open("r+b") as file:
        file.seek(stored.start + stored.bytes - 1)
        file.write(b"\x07")
    with pytest.raises(CheckpointError, match="the bytes of head have changed"):
        load(packed, expert_bytes=2 * RECORD["float32"])


def test_a_packed_file_of_another_model_or_version_is_refused(packed: Path):
    tensors = load_file(packed / PACKED)
    about = {"format": "trinity-packed-1", "kind": "float32"}
    for change, metadata, what in (
        ({}, {"format": "trinity-packed-2", "kind": "float32"}, "packed by another version"),
        ({}, {"format": "trinity-packed-1", "kind": "int3"}, "packed by another version"),
        ({"norm": torch.zeros(3)}, about, "holds another norm"),
        ({"sums": torch.zeros(3, dtype=torch.int64)}, about, "lacks the sums"),
    ):
        save_file(tensors | change, packed / PACKED, metadata=metadata)
        with pytest.raises(CheckpointError, match=what):
            load(packed)
    (packed / PACKED).write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match="cut off or altered"):
        load(packed)


def test_what_asks_for_a_model_of_full_precision_says_where_it_is(models: Path):
    with pytest.raises(CheckpointError, match="int4 holds weights packed for inference. Name the model"):
        open_model(models / "int4")


def test_no_command_takes_a_packed_folder_for_something_else(models: Path, packed: Path, tmp_path: Path, capsys):
    assert main(["import", str(packed), str(tmp_path / "x")]) == 1
    assert "holds weights packed for inference" in capsys.readouterr().err
    shutil.copyfile(models / "whole" / "model.safetensors", packed / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds packed.safetensors beside other weights"):
        load(packed)
    (packed / "model.safetensors").unlink()
    (packed / PACKED).unlink()
    with pytest.raises(CheckpointError, match="packed.safetensors is missing"):
        load(packed)


def test_an_import_copies_what_it_checked(models: Path, tmp_path: Path):
    shutil.copytree(models / "whole", tmp_path / "source")
    shutil.copyfile(models / "int4" / PACKED, tmp_path / "source" / PACKED)
    (tmp_path / "source" / "stray.safetensors").write_bytes(b"")
    (tmp_path / "source" / PACKED).rename(tmp_path / "source" / "other.safetensors")
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_a_full_disk_leaves_nothing(models: Path, tmp_path: Path, monkeypatch, capsys):
    def full(*_) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr("trinity.engine.packed.checksum", full)
    assert main(["export", str(models / "whole"), str(tmp_path / "out"), "--format", "packed"]) != 0
    told = capsys.readouterr().err
    assert "full" in told.lower() or "space" in told.lower(), told
    assert not list(tmp_path.iterdir())


def test_a_conversation_outlives_experts_that_cannot_be_read(packed: Path, monkeypatch, capsys):
    content, turns = (packed / PACKED).read_bytes(), iter(["one", "two", "three"])

    def typed(*_) -> str:
        turn = next(turns, "/quit")
        with (packed / PACKED).open("r+b") as file:  # it is away while the second turn is answered
            file.truncate(len(content) // 2) if turn == "two" else file.write(content)
        return turn

    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", str(packed), "--expert-bytes", "60K", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    told = capsys.readouterr()
    assert told.err.count("is shorter than it was") == 1 and told.out.count("\n") >= 2


def test_what_cannot_be_had_is_said(models: Path, monkeypatch):
    for arguments, what in (
        (
            (models / "whole", None, 10**6),
            "is not packed, so its experts cannot stay on the disk. Write a packed folder",
        ),
        ((models / "int4", "int8", 0), "is packed in int4, not in int8"),
        ((models / "int4", None, 2 * RECORD["int4"] - 1), "Give two of them room at least"),
        ((models / "int4", None, -1), "Give two of them room at least"),
        ((models / "whole", "int3", 0), "dtype 'int3' is not offered"),
    ):
        with pytest.raises(UsageError, match=what):
            load(arguments[0], arguments[1], expert_bytes=arguments[2])
    monkeypatch.setattr(loaded, "available_bytes", lambda _: 100_000)
    for model in ("whole", "float32"):
        with pytest.raises(
            UsageError, match=r"float32 takes .* MiB for weights and a step; 97\.7 KiB are free on the cpu"
        ):
            load(models / model)
    with pytest.raises(UsageError, match="leave experts on the disk with --expert-bytes: .* are needed at least"):
        load(models / "float32")
    monkeypatch.setattr(loaded, "is_loaded", lambda: False)
    with pytest.raises(UsageError, match=r"bfloat16 takes .* KiB for weights and a step; 97\.7 KiB are free"):
        load(models / "whole", "bfloat16")
    with pytest.raises(UsageError, match="A packed folder needs the compiled kernels"):
        load(models / "int4")


def test_the_command_line_keeps_experts_on_the_disk(models: Path, capsys):
    asked = ["generate", str(models / "int4"), "--prompt", "def f", "--max-new-tokens", "12", "--json"]
    assert main([*asked, "--expert-bytes", "40K"]) == 0
    streamed = capsys.readouterr()
    assert main(asked) == 0
    held = capsys.readouterr()
    assert json.loads(streamed.out) == json.loads(held.out) and "experts:" not in held.err
    assert "were in memory" in streamed.err and "a thread had to wait" in streamed.err
    assert main([*asked, "--expert-bytes", "many"]) == 2
    assert "'many' is not a number of bytes" in capsys.readouterr().err


def test_export_refuses_a_precision_that_a_format_has_not(models: Path, tmp_path: Path, capsys):
    for form, dtype, what in (("packed", "q8_0", "--format gguf"), ("hf", "int4", "--format packed")):
        assert main(["export", str(models / "whole"), str(tmp_path / "x"), "--format", form, "--dtype", dtype]) == 2
        assert what in capsys.readouterr().err
    assert main(["export", str(models / "int4"), str(tmp_path / "x")]) == 1
    assert "packed for inference" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_kill_while_it_is_written_leaves_nothing(models: Path, tmp_path: Path, monkeypatch):
    def refuse(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trinity.engine.packed.checksum", refuse)
    with pytest.raises(KeyboardInterrupt):
        write_packed(tmp_path, find_model(models / "whole"), "int4")
    assert main(["export", str(models / "whole"), str(tmp_path / "out"), "--format", "packed"]) != 0
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == [PACKED]


@given(values=st.binary(min_size=1, max_size=64), place=st.integers(0, 63), flip=st.integers(1, 255))
def test_no_change_of_one_byte_goes_unseen(values: bytes, place: int, flip: int):
    changed = bytearray(values)
    changed[place % len(values)] ^= flip
    one, other = (torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in (values, changed))
    assert checksum(one) == checksum_plainly(one) and checksum(other) == checksum_plainly(other)
    assert checksum(one) != checksum(other)


@given(seed=st.integers(0, 99), bit=st.integers(0, 63), many=st.integers(1, 8))
def test_nor_do_changes_of_one_bit_in_many_words(seed: int, bit: int, many: int):
    words = torch.randint(-(2**62), 2**62, (200,), generator=torch.Generator().manual_seed(seed))
    changed = words.clone()
    changed[torch.randperm(200)[: 2 * many]] ^= -(2**63) if bit == 63 else 1 << bit
    assert checksum(words) != checksum(changed)


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64]),
)
def test_a_header_is_that_of_a_safetensors_file(tmp_path_factory, shapes: list[list[int]], dtype: torch.dtype):
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    tensors = {f"t{i}": (torch.randn(shape) * 9).to(dtype) for i, shape in enumerate(shapes)}
    header = header_of({name: (dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, {"a": "b"})
    values = b"".join(bytes(tensor.flatten().view(torch.uint8).tolist()) for tensor in tensors.values())
    path.write_bytes(header + values)
    assert len(header) % 64 == 0
    for found in (load_file(path), {name: TensorFile(path).read(name) for name in tensors}):
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
