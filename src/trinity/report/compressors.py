"""Bits per byte of the usual compressors: the yardstick beside a model's own bits per byte on the same bytes."""

import gzip
import lzma
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FileBits:
    """Bits per byte of one held-out file under the model and under two compressors, each file on its own."""

    name: str
    bytes: int
    model: float
    gzip: float
    xz: float


def gzip_bits_per_byte(content: bytes) -> float:
    """Bits that `gzip -9` needs for each byte of `content` (its 18 bytes of frame included)."""
    return 8 * len(gzip.compress(content, 9, mtime=0)) / max(1, len(content))


def xz_bits_per_byte(content: bytes) -> float:
    """Bits that `xz -9e` needs for each byte of `content` (its frame included)."""
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / max(1, len(content))


def beside_compressors(name: str, content: bytes, model_bits_per_byte: float) -> FileBits:
    """The model's figure for a file with those of gzip and xz beside it."""
    return FileBits(
        name=name,
        bytes=len(content),
        model=model_bits_per_byte,
        gzip=gzip_bits_per_byte(content),
        xz=xz_bits_per_byte(content),
    )
