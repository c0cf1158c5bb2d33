"""Tensors of a checkpoint as files: one safetensors file a process, written and read through torch's planners.

    PART/shard-00002-model-00001-of-00001.safetensors      what process 2 of the writers held of PART's tensors

Planning (who writes what, which stored pieces make up a wanted one) and the file format are those of
torch.distributed.checkpoint; a file says in its header where each of its pieces lies in the whole tensor, so nothing is
ever unpickled. `dcp.save` and `dcp.load` themselves are not called: they have every process read every header, fail on
one process alone with an error of their own kind, and warn where there is one process (docs/adr/0014).
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trinity.base.errors import CheckpointError, StorageError
from trinity.ckpt.peers import ALONE, Peers

FILE_BYTES = 4 * 10**9  # of one process in one file, about: a file is put together in memory before it is written


@dataclass(frozen=True)
class Piece:
    """What this process holds of a tensor: `values`, contiguous in memory, from `offsets` on in a tensor of `shape`."""

    values: Tensor
    shape: torch.Size
    offsets: torch.Size


def piece_of(tensor: Tensor, values: Tensor) -> Piece:
    """Where this process's part of `tensor` lies; `values` is a copy of that part, wherever it was copied to."""
    if not isinstance(tensor, DTensor):
        return Piece(values, tensor.shape, torch.Size([0] * tensor.dim()))
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(sizes) == tuple(values.shape), "a part that is not one box of its tensor cannot be written"
    return Piece(values, tensor.shape, torch.Size(offsets))


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without autograd."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class _PiecePlanner(DefaultSavePlanner):
    """Plans the writing of pieces; equal pieces of several processes are written by one of them."""

    def __init__(self, pieces: dict[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> SavePlan:
        # A process beyond the end of a short tensor holds nothing of it, and writes nothing.
        self.plan = SavePlan(
            [_write_item(name, piece) for name, piece in self.pieces.items() if _holds_something(piece)]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn].values


def _holds_something(piece: Piece) -> bool:
    return piece.values.numel() > 0 or 0 in piece.shape


def _write_item(name: str, piece: Piece) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, piece.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=piece.offsets, sizes=piece.values.shape),
            properties=TensorProperties(dtype=piece.values.dtype),
            size=piece.shape,
        ),
    )


def write_part(folder: Path, pieces: dict[str, Piece], peers: Peers = ALONE) -> list[Path]:
    """Write the tensors of which the processes hold `pieces` (the same names on all); the files of this process.

    Every piece must be in memory of the CPU. Raises ValueError when the pieces do not make up whole tensors. Files hold
    their tensors in the order of the names: an optimiser that was restored lists its own in another than a fresh one.
    """
    pieces = dict(sorted(pieces.items()))
    writer = HuggingFaceStorageWriter(str(folder), _files_of(pieces, peers.size), save_distributed=True)
    planner = _PiecePlanner(pieces)
    planner.set_up_planner({}, is_coordinator=peers.is_first)
    writer.set_up_storage_writer(peers.is_first)
    local = peers.together(lambda: writer.prepare_local_plan(planner.create_local_plan()))
    gathered = peers.gather(local)
    plans = peers.first(lambda: writer.prepare_global_plan(planner.create_global_plan(gathered)[0]))
    plan = planner.finish_plan(peers.scatter(plans or []))
    results = peers.together(lambda: writer.write_data(plan, planner).wait())
    files = sorted({folder / result.storage_data.relative_path for result in results})
    for path in files:
        _order_header(path)
    return files


def _order_header(path: Path) -> None:
    """Put the entries of a file's header into the order of their names; the library writes some of them in any order.

    So checkpoints of equal tensors are equal files, which anyone can compare.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        ordered = json.dumps(json.loads(file.read(size)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        header = ordered.encode()
        assert len(header) <= size, "the same entries, written without a blank, take no more room"
        file.seek(8)
        file.write(header.ljust(size))


def _files_of(pieces: dict[str, Piece], processes: int) -> dict[str, int]:
    """Which file, counted from 1, takes each tensor: in the order of names, to FILE_BYTES a process."""
    numbers, number, size = {}, 1, 0
    for name, piece in pieces.items():
        bytes_ = math.prod(piece.shape) * piece.values.element_size()
        if size and size + bytes_ > FILE_BYTES * processes:
            number, size = number + 1, 0
        numbers[name], size = number, size + bytes_
    return numbers


class StoredPart:
    """The tensors in the safetensors files of a folder. Only the first process reads all headers; each its values."""

    def __init__(self, folder: Path, peers: Peers = ALONE) -> None:
        self.folder, self.peers = folder, peers
        self._reader = HuggingFaceStorageReader(str(folder))
        metadata = peers.share(peers.first(self._headers))
        assert metadata is not None
        self._metadata = metadata

    def _headers(self) -> Metadata:
        try:
            return self._reader.read_metadata()
        except Exception as error:  # the library raises whatever a cut-off header led to
            raise CheckpointError(f"{self.folder} cannot be read: {error}.", "Copy the folder again.") from error

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shape, dtype and pieces of every tensor, from the headers alone."""
        return self._metadata.state_dict_metadata  # type: ignore[return-value]  (no bytes are ever stored)

    def read_into(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors in place, DTensors of any layout among them, converting to their dtypes."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

        def read() -> None:
            self.check(tensors)
            planner.set_up_planner(tensors, self._metadata, self.peers.is_first)  # type: ignore[arg-type]
            self._reader.set_up_storage_reader(self._metadata, self.peers.is_first)
            plan = planner.create_local_plan()
            wanted = [item for item in plan.items if 0 not in item.lengths]
            self._reader.read_data(replace(plan, items=wanted), planner).wait()

        with torch.no_grad():
            self.peers.together(read)

    def check(self, tensors: dict[str, Tensor]) -> None:
        """Demand that tensors of these names and shapes are stored, by the headers alone: equal on all processes."""
        for name, tensor in tensors.items():
            found = self.tensors.get(name)
            if found is None or found.size != tensor.shape:
                held = "nothing" if found is None else f"a tensor of shape {list(found.size)}"
                raise CheckpointError(
                    f"{self.folder} holds {held} where {name} of shape {list(tensor.shape)} is wanted.",
                    "It belongs to another architecture.",
                )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of safetensors files, put together from its pieces; one copy in memory."""
    part = StoredPart(folder)
    tensors = {name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in part.tensors.items()}
    part.read_into(tensors)
    return tensors


def compare(path: Path, pieces: dict[str, Piece]) -> None:
    """Read a file back and demand the values that are in memory."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            found, wanted = file.get_tensor(name), pieces[name].values
            if not torch.equal(found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)):
                raise StorageError(
                    f"{path}: {name} read back differently from what was written.", "The disk or memory is failing."
                )


def missing(folder: Path, shapes: dict[str, torch.Size]) -> list[str]:
    """What is not held exactly once by the files of a folder, one sentence each; rows are counted along dimension 0.

    Dimension 0 of stacked experts counts experts, so an expert left out or written twice is named.
    """
    found = StoredPart(folder).tensors
    sentences = [f"{name} is not part of it" for name in found if name not in shapes]
    for name, shape in shapes.items():
        if name not in found:
            sentences.append(f"{name} is missing")
        elif math.prod(shape) and shape:
            held = torch.zeros(shape[0], dtype=torch.int64)
            for chunk in found[name].chunks:
                rows = slice(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
                held[rows] += math.prod(chunk.sizes[1:])
            wrong = (held != math.prod(shape[1:])).nonzero().flatten().tolist()
            if wrong or found[name].size != shape:
                what = "expert" if ".experts." in name else "row"
                rows = ", ".join(map(str, wrong[:4])) + (", ..." if len(wrong) > 4 else "")
                sentences.append(f"{what} {rows} of {name} is not held exactly once")
    return sentences
