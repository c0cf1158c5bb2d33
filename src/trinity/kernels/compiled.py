"""The C++ sources of this package, compiled on first use into the user's cache folder; without them torch works.

The library is named after a hash of the sources, the torch release, the compiler's flags and the processor, so that
what is found there fits. Processes that start together build once: one holds a lock (which dies with its holder), the
rest wait for it. TRINITY_KERNELS=off leaves the library alone, TRINITY_KERNELS=tiles the matrix unit of the processor.
"""

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trinity.base.progress import progress

_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FLAGS = ["-O3", "-std=c++20", "-march=native", "-fno-math-errno", "-fPIC", "-fopenmp"]
_FLAGS += ["-DAT_PARALLEL_OPENMP=1", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]

# Declared here, so that shapes trace on meta tensors where nothing is compiled. All write into what they are given.
_OPERATORS = torch.library.Library("trinity", "DEF")
for _schema in (
    "matmul(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()",
    "multiply_by_amx(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()",
    "multiply_by_tiles(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()",
    "experts(Tensor x, Tensor order, Tensor ends, Tensor weights, Tensor gate_up, Tensor down, Tensor(a!) out,"
    " Tensor(b!) kept, Tensor(c!) rows) -> ()",
    "experts_backward(Tensor grad, Tensor x, Tensor order, Tensor ends, Tensor weights, Tensor gate_up, Tensor down,"
    " Tensor kept, Tensor(a!) grad_x, Tensor(b!) grad_weights, Tensor(c!) grad_gate_up, Tensor(d!) grad_down,"
    " bool add_gate_up, bool add_down, Tensor(e!) rows) -> ()",
    "attend(Tensor q, Tensor k, Tensor v, Tensor first, float scale, Tensor(a!) out, Tensor(b!) sums) -> ()",
    "attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor first, float scale, Tensor out, Tensor sums,"
    " Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()",
    "normalise(Tensor x, Tensor weight, float eps, Tensor(a!) out, Tensor(b!) scale) -> ()",
    "normalise_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, Tensor(a!) grad_x, Tensor(b!) grad_weight)"
    " -> ()",
    "orthogonalise(Tensor(a!) stack, int steps, float a, float b, float c) -> ()",
    "pack(Tensor matrices, int kind, Tensor(a!) out) -> ()",
):
    _OPERATORS.define(_schema)
    _OPERATORS.impl(_schema.partition("(")[0], lambda *_: None, "Meta")
_OPERATORS.define("checksum(Tensor bytes) -> int")
_OPERATORS.define("use_amx(bool wanted) -> bool")  # from now on; whether it is there and lent by Linux, too


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take these: float32 on a CPU, outside torch.compile, and the library is there.

    Tensors without values (a dry run) always fit: they stand for those of a machine that has the kernels.
    """
    return (
        all(tensor.device.type in ("cpu", "meta") and tensor.dtype == torch.float32 for tensor in tensors)
        and not torch.compiler.is_compiling()
        and (any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors) or is_loaded())
    )


@functools.cache
def is_loaded() -> bool:
    """Load the library, building it if need be. False, after one sentence on stderr, where that cannot be done."""
    if os.environ.get("TRINITY_KERNELS") == "off":
        return False
    try:
        torch.ops.load_library(str(_built()))
        torch.ops.trinity.use_amx(os.environ.get("TRINITY_KERNELS") != "tiles")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        remedy = "Install g++ to have them built."
        if isinstance(error, OSError) and error.filename not in (None, os.environ.get("CXX")):
            remedy = "Make that a place to write in, or name another as XDG_CACHE_HOME."
        _say(f"The CPU kernels are not used, all is slower ({_reason(error)}). {remedy}")
        return False
    return True


def _built() -> Path:
    """The path of the compiled library."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    text = [path.read_text() for path in _SOURCES + _HEADERS]
    key = hashlib.sha256("\n".join([*text, *_FLAGS, torch.__version__, compiler or "", _processor()]).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trinity"
    library = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    if compiler is None:
        raise OSError("no C++ compiler was found")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _say("Compiling the CPU kernels, once; this takes about a minute.")
            _compile(compiler, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    """Build beside the goal, every source on a core of its own, and rename: a reader finds all of it or nothing."""
    root = Path(torch.__file__).parent
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, timeout=600)
    with tempfile.TemporaryDirectory(dir=library.parent) as place, ThreadPoolExecutor(os.cpu_count()) as pool:
        half = Path(place) / library.name
        objects = [str(half.with_suffix(f".{path.stem}.o")) for path in _SOURCES]
        make = [compiler, *_FLAGS, f"-isystem{root / 'include'}", "-c"]
        with progress("Compiling", sum(path.stat().st_size for path in _SOURCES)) as advance:

            def compile_one(path: Path, made: str) -> None:
                run([*make, str(path), "-o", made])
                advance(path.stat().st_size)

            list(pool.map(compile_one, _SOURCES, objects))
        run([compiler, *_FLAGS, "-shared", *objects, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(half)])
        half.replace(library)


def _processor() -> str:
    """What the compiled code depends on: the architecture and the processor's instruction sets."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        flags = platform.processor()
    return platform.machine() + flags


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        return "the compiler said: " + (lines[0] if lines else f"exit code {error.returncode}")
    return str(error).splitlines()[0]


def _say(sentence: str) -> None:
    """Once on a machine: of several processes under torchrun the first speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)
