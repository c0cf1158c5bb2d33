"""`trinity bench decode`: its table and figures, what it refuses, and processes that end with it. No time is judged."""

import importlib.util
import inspect
import json
import signal
import textwrap
import time
from pathlib import Path

import pytest
import torch

from started import starting_trinity, trinity
from trinity.base.errors import UsageError
from trinity.bench.figures import check
from trinity.bench.subject import Asked, DrawnWeights, Side, Subject
from trinity.ckpt.hf import write_hf
from trinity.cli.main import main
from trinity.model.init import build_model
from trinity.plan.params import count_parameters
from trinity.recipes.table import recipe
from trinity.text.train_bpe import train_bpe

ROOT = Path(__file__).parents[2]
LITTLE = ["--batch", "1", "--prefill", "64", "--tokens", "2", "--repeats", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "little"
    folder.mkdir()
    write_hf(folder, build_model(recipe("debug").model, 5))
    train_bpe([inspect.getsource(textwrap)] * 2, 512).save(folder)
    return folder


def test_the_table_and_the_figures(folder: Path, tmp_path: Path):
    text, out = tmp_path / "text.py", tmp_path / "figures.json"
    text.write_text(inspect.getsource(textwrap)[:3000])
    sizes = [
        "--batch",
        "1",
        "2",
        "--prefill",
        "64",
        "--tokens",
        "2",
        "--repeats",
        "1",
        "--drafts",
        "3",
        "--requests",
        "3",
    ]
    done = trinity("bench", "decode", str(folder), *sizes, "--text", str(text), "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    head = next(line for line in done.stdout.splitlines() if "tokens/s" in line)
    assert head.split("  ")[1:] and all(case in head for case in ("decode 1", "decode 2", "prefill 64", "requests 3"))
    assert "\n  trinity-float32  " in done.stdout and "\n  trinity-float32, repeats, 3 drafts " in done.stdout
    assert done.stderr.startswith("trinity alone is measured; ") and done.stderr.count("\n") == 1
    one = found["engines"].pop("trinity-float32")
    assert found["engines"] == found["left_out"] == {}
    speeds, count, width = one["tokens_per_second"], count_parameters(recipe("debug").model), 64
    assert list(speeds) == ["decode 1", "decode 2", "prefill 64", "requests 3"] and found["device"] == "cpu"
    assert one["peak_bytes"] > 0 < one["share_of_bandwidth_at_batch_1"]
    assert one["weight_bytes_per_token"] == 4 * (count.active + count.selection_bias + width)
    alone, drafted = list(one["drafts"].values())[:2]
    assert (alone["experts_per_token_and_layer"]["median"], alone["share_taken"]["high"]) == (2, 0)
    assert alone["share_of_distinct_tokens"] == drafted["share_of_distinct_tokens"]  # the same answer
    whole = found["text"]["engines"]["trinity-float32"]
    assert (whole["relative_error_of_logits"], whole["same_likeliest_token"]) == (0, 1)
    assert 300 < whole["perplexity"] < 800  # of a vocabulary of 512, nothing learnt


@pytest.mark.slow
def test_fewer_bits_are_set_beside_float32(folder: Path, tmp_path: Path):
    out = tmp_path / "figures.json"
    line = [*LITTLE, "--repeats", "2", "--dtype", "float32", "int8", "int4", "--text", str(Path(__file__))]
    assert trinity("bench", "decode", str(folder), *line, "--json", str(out)).returncode == 0
    found = json.loads(out.read_text())
    for one in found["engines"].values():
        assert all(0 < speed["low"] <= speed["median"] <= speed["high"] for speed in one["tokens_per_second"].values())
    _, int8, int4 = found["text"]["engines"].values()
    assert int8["beside"] == int4["beside"] == "trinity-float32"
    assert 0 < int8["relative_error_of_logits"] < int4["relative_error_of_logits"] < 1


@pytest.mark.slow
def test_what_an_engine_cannot_is_told_by_the_command(folder: Path):
    done = trinity("bench", "decode", str(folder), "--dtype", "int8", *LITTLE, TRINITY_KERNELS="off")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.splitlines()[1:] == [
        "trinity bench: int8 needs the compiled kernels. Install g++, or use the model in bfloat16."
    ]


def test_who_fails_is_left_out_with_the_reason(folder: Path, monkeypatch, capsys):
    class Worker:
        def __init__(self, side, asked) -> None:
            self.side, self.told = side, {"peak_bytes": None, "experts_by": None}
            self.failed = "Its process ended with -9." if side.precision == "int8" else None

        def ask(self, *request):
            return 2.0 if self.failed is None else None

        def end(self) -> None:
            pass

    monkeypatch.setattr("trinity.bench.figures.Worker", Worker)
    assert main(["bench", "decode", str(folder), "--dtype", "float32", "int8", *LITTLE]) == 0
    shown = capsys.readouterr().out
    assert "\n  trinity-float32 " in shown and "\n  trinity-int8" not in shown
    assert shown.endswith("\n\ntrinity-int8 is left out: Its process ended with -9.\n")


def test_a_packed_folder_is_measured_as_it_is_packed(folder: Path, tmp_path: Path, monkeypatch):
    measured = []
    monkeypatch.setattr("trinity.cli.bench.measure", lambda sides, options: measured.extend(sides))
    assert main(["export", str(folder), str(tmp_path / "packed"), "--format", "packed", "--dtype", "bfloat16"]) == 0
    assert main(["bench", "decode", str(tmp_path / "packed"), *LITTLE]) == 0
    assert [side.name for side in measured] == ["trinity-bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--batch", "0"], "argument --batch: '0' is not a whole number above 0. Try"),
        (["--prefill", "512"], "--prefill asks for 513 tokens of context, answer included; little has 512. Lower"),
        (["--tokens", "400"], "--tokens asks for 530 tokens of context, answer included; little has 512. Lower"),
        (["--text", "/bin/true"], "/bin/true is no text in UTF-8. Name a text file."),
        (["--text", "nowhere.txt"], "nowhere.txt: No such file or directory."),
        (["--json", "nowhere/f.json"], "There is no folder for nowhere/f.json. Make it first, or name another"),
        (["--beside", "vllm"], "argument --beside: invalid choice: 'vllm'"),
        (["--requests", "-1"], "argument --requests: '-1' is not a whole number above 0. Try"),
        (["--beside", "llama.cpp"], "llama.cpp cannot be measured: no llama_cpp here. Try: CXXFLAGS="),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_sentence(folder: Path, arguments: list[str], told: str, capsys):
    if "llama.cpp" in arguments and importlib.util.find_spec("llama_cpp"):
        pytest.skip("llama.cpp is here")
    try:
        code = main(["bench", "decode", str(folder), *arguments])
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("trinity alone ")]
    assert code and not shown.out and len(lines) == 1 and told in lines[0], shown.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_here_is_told(folder: Path, capsys):
    assert main(["bench", "decode", str(folder), "--device", "cuda"]) == 2
    told = "There is no GPU of compute capability 8 or more that torch can use. Choose device 'cpu' or 'auto'."
    assert capsys.readouterr().err == f"trinity bench: {told}\n"


def test_llama_cpp_is_not_set_beside_a_gpu(folder: Path):
    subject = Subject(name="little", config=recipe("debug").model, folder=folder)
    side = Side(engine="llama", precision="float32", subject=subject)
    asked = Asked(batches=(1,), prefill=(8,), requests=0, prompt=8, tokens=2, repeats=1, device="cuda", threads=1,
                  awake=False, text=None, drafts=0, work=folder)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError, match="llama.cpp is measured on a CPU"):
        patch.setattr("trinity.bench.figures.PACKAGES", {"llama": []})
        check([side], asked)


def test_a_model_that_does_not_fit_is_not_loaded(folder: Path, monkeypatch, capsys):
    monkeypatch.setattr("trinity.bench.figures.available_bytes", lambda device: 2**20)
    assert main(["bench", "decode", str(folder), "--dtype", "float32", "int4"]) == 2
    error = capsys.readouterr().err
    assert "trinity-float32, trinity-int4 of little need 1.4 MiB of memory at once; 1.0 MiB are free." in error


def test_no_model_is_told(tmp_path: Path, capsys):
    assert main(["bench", "decode", str(tmp_path / "none")]) == 1
    assert "There is no model folder at" in capsys.readouterr().err


def stopped_children(pid: int) -> list[int]:
    """Processes below `pid` that are stopped, at any depth."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid:
            child = int(stat.parent.name)
            found += [child] * (state == "T") + stopped_children(child)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
def test_stopped_engines_end_with_the_command(folder: Path):
    with starting_trinity("bench", "decode", str(folder), *LITTLE) as command:
        waiting: list[int] = []

        def waits() -> bool:
            waiting[:] = stopped_children(command.process.pid or 0)
            return bool(waiting)

        assert command.wait_for(waits)
        command.send(signal.SIGKILL)
        command.ended()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in waiting):
        assert time.monotonic() < end, f"{waiting} outlived the command"
        time.sleep(0.01)


def test_random_weights_are_the_same_however_they_are_asked_for():
    weights = DrawnWeights(recipe("debug").model)
    for name, tensor in weights.items():
        assert tensor.any() or name.endswith("expert_bias"), name
        if ".experts." in name:
            assert torch.equal(torch.stack([*weights.experts(name)]), tensor), name


@pytest.mark.slow
def test_engines_are_given_the_same_random_weights(tmp_path: Path, monkeypatch):
    out, text = tmp_path / "figures.json", tmp_path / "text.py"
    text.write_text(inspect.getsource(textwrap)[:3000])
    engines = ["--engine", "trinity-float32", "--engine", "transformers-float32", "--requests", "5"]
    monkeypatch.setattr("sys.argv", ["decode.py", "debug", *engines, *LITTLE, "--text", str(text), "--json", str(out)])
    decode_script().main()
    found = json.loads(out.read_text())
    other = found["text"]["engines"]["transformers-float32"]
    assert other["beside"] == "trinity-float32" and other["relative_error_of_logits"] < 1e-4
    assert all("requests 5" in engine["tokens_per_second"] for engine in found["engines"].values())


def decode_script():
    spec = importlib.util.spec_from_file_location("decode_script", ROOT / "bench" / "decode.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["lab256", "nano", "large"])
def test_the_dense_twin_has_as_many_parameters(name: str):
    config = recipe(name).model
    twin = decode_script().dense_twin(config)
    assert twin.num_sparse_layers == 0 and twin.head_dim == config.head_dim
    assert count_parameters(twin).total == pytest.approx(count_parameters(config).total, rel=2e-3)


@pytest.mark.slow
def test_the_script_sets_sparse_beside_dense(tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    line = ["decode.py", "debug", "--engine", "trinity-int8", "--dense", *LITTLE, "--drafts", "2", "--json", str(out)]
    monkeypatch.setattr("sys.argv", line)
    decode_script().main()
    shown = capsys.readouterr().out
    assert "\n  trinity-int8 / dense-int8 " in shown and "Greedy answers of random weights fall into loops" in shown
    assert json.loads(out.read_text())["engines"]["dense-int8"]["parameters"] == pytest.approx(324312, rel=0.05)
