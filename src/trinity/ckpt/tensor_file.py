"""One safetensors file, of which tensors are read when they are asked for, by ordinary reads.

safetensors itself checks the header; but it maps the file, and a mapped file that is cut short or lost by its disk ends
the process that reads it. A read that comes back short is a sentence.
"""

import json
import os
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trinity.base.errors import CheckpointError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
           "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Stored(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file
    bytes: int


class TensorFile:
    """Names, types and shapes at once, values on demand. CheckpointError for a file that is none, or not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing.", "Copy the folder again.") from error
        except SafetensorError as error:
            raise CheckpointError(f"{path} is cut off or altered: {error}.", "Copy the file again.") from error
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        self.tensors: dict[str, Stored] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                if entry["dtype"] not in _DTYPES:
                    raise CheckpointError(f"{path}: {name} is of type {entry['dtype']}.", "It cannot be read.")
                begin, end = entry["data_offsets"]
                dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
                self.tensors[name] = Stored(dtype, shape, 8 + size + begin, end - begin)

    def read(self, name: str) -> Tensor:
        """A tensor, or CheckpointError where the file is no longer what its header says."""
        stored = self.tensors[name]
        values = torch.empty(stored.bytes, dtype=torch.uint8)
        rest, at = values.numpy().data, stored.start
        try:
            with self.path.open("rb", buffering=0) as file:
                while rest:
                    got = os.preadv(file.fileno(), [rest], at)
                    if got == 0:
                        raise CheckpointError(f"{self.path} is shorter than it was.", "Copy the file again.")
                    rest, at = rest[got:], at + got
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.", "Copy the file again.") from error
        return values.view(stored.dtype).reshape(stored.shape)


def header_of(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """How a safetensors file of these tensors begins; their values follow, in this order and without gaps.

    For files that are written while their values come to be: safetensors itself wants all of them in memory.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written = written.ljust(-(-(8 + len(written)) // 64) * 64 - 8)  # so that values begin at whole cache lines
    return struct.pack("<Q", len(written)) + written
