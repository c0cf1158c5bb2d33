"""A folder of weights as the decoder has them: written once, opened without packing, experts read when they are chosen.

    OUT/config.json, tokenizer.json, ...    as in a Hugging Face folder
    OUT/packed.safetensors                  every tensor of `layout`, then `sums`: one number for each part of `pack`

The sums (kernels/checksum.h) are checked whenever a part is read, at the start or in the middle of an answer.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trinity.base.errors import CheckpointError
from trinity.base.progress import progress
from trinity.ckpt.opened import StoredModel
from trinity.ckpt.tensor_file import TensorFile, header_of
from trinity.ckpt.weights import PACKED
from trinity.config.model import ModelConfig
from trinity.engine.weights import KINDS, DecoderWeights, Kind, Place, kind_named, layout, pack
from trinity.kernels.compiled import is_loaded
from trinity.plan.inference import record_bytes

FORMAT = "trinity-packed-1"
SUMS = "sums"
AGAIN = "Export the model again: trinity export MODEL OUT --format packed."


def write_packed(
    folder: Path, stored: StoredModel, kind: Kind, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write the weights of a model into an existing folder, a tensor or an expert in memory at a time.

    `advance` is told bytes; see `packed_bytes` for their sum.
    """
    places = layout(stored.config, kind)
    sums = torch.empty(_parts(places), dtype=torch.int64)
    tensors = {place.name: (place.dtype, place.shape) for place in places} | {SUMS: (sums.dtype, tuple(sums.shape))}
    with (folder / PACKED).open("wb") as file:
        file.write(header_of(tensors, {"format": FORMAT, "kind": kind}))
        for number, (_, part) in enumerate(pack(stored.config, stored.weights, kind)):
            sums[number] = checksum(part)
            file.write(_bytes_of(part).numpy().data)
            advance(part.nbytes)
        file.write(_bytes_of(sums).numpy().data)


def packed_bytes(config: ModelConfig, kind: Kind) -> int:
    return sum(place.bytes for place in layout(config, kind))


def read_packed(file: TensorFile, config: ModelConfig, expert_bytes: int = 0) -> DecoderWeights:
    """The weights of a packed file; where `expert_bytes` are given, experts stay there but for as many bytes of them.

    CheckpointError where the file is of another model, or where its bytes are not those that were written.
    """
    kind = kind_of(file)
    places = layout(config, kind)
    for place in places:
        found = file.tensors.get(place.name)
        if found is None or (found.dtype, found.shape) != (place.dtype, place.shape):
            raise CheckpointError(f"{file.path} holds another {place.name} than config.json asks for.", AGAIN)
    if SUMS not in file.tensors or file.tensors[SUMS].shape != (_parts(places),):
        raise CheckpointError(f"{file.path} lacks the sums of its tensors.", AGAIN)
    record = record_bytes(config, kind)
    streamed = 0 < expert_bytes < _experts(places) * record
    sums = dict(zip(places, file.read(SUMS).split([_parts([place]) for place in places]), strict=True))
    left = [place for place in places if streamed and _holds_experts(place)]
    read = [place for place in places if place not in left]
    tensors: dict[str, Tensor] = {}
    with progress(f"Reading {file.path.parent.name}", sum(place.bytes for place in read)) as advance:
        for place in read:
            tensors[place.name] = file.read(place.name)
            for part, wanted in zip(tensors[place.name].chunk(len(sums[place])), sums[place].tolist(), strict=True):
                if checksum(part) != wanted:
                    changed = f"{file.path}: the bytes of {place.name} have changed."
                    raise CheckpointError(changed, "Copy the file again.")
                advance(part.nbytes)
    if not streamed:
        return DecoderWeights(config, kind, tensors)
    starts = [file.tensors[place.name].start for place in left]
    of_experts = torch.cat([sums[place] for place in left])
    cache = torch.classes.trinity.ExpertCache(
        str(file.path), starts, config.num_experts, record, expert_bytes // record, of_experts
    )
    return DecoderWeights(config, kind, tensors, cache)


def kind_of(file: TensorFile) -> Kind:
    kind = file.metadata.get("kind", "")
    if file.metadata.get("format") != FORMAT or kind not in KINDS:
        raise CheckpointError(f"{file.path} was packed by another version of trinity.", AGAIN)
    return kind_named(kind)


def checksum(part: Tensor) -> int:
    """Of a part's bytes: see kernels/checksum.h."""
    return torch.ops.trinity.checksum(_bytes_of(part)) if is_loaded() else checksum_plainly(part)


def checksum_plainly(part: Tensor) -> int:
    """The twin."""
    bytes_ = _bytes_of(part)
    words = torch.nn.functional.pad(bytes_, (0, -len(bytes_) % 8)).view(torch.int64)
    mixed = words ^ torch.arange(1, len(words) + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ mixed >> shift & (1 << 64 - shift) - 1) * _signed(factor)
    mixed = mixed ^ mixed >> 31 & (1 << 33) - 1
    return int(mixed.sum())


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _bytes_of(part: Tensor) -> Tensor:
    return part.contiguous().flatten().view(torch.uint8)


def _holds_experts(place: Place) -> bool:
    return place.name.endswith(".experts")


def _parts(places: list[Place]) -> int:
    return sum(place.shape[0] if _holds_experts(place) else 1 for place in places)


def _experts(places: list[Place]) -> int:
    return sum(place.shape[0] for place in places if _holds_experts(place))
