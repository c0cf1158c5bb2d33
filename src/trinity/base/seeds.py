"""Named seeds: two streams of randomness never share a seed by accident, and a seed depends on nothing but its name."""

import hashlib


def named_seed(root: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names` under the run's root seed, e.g. named_seed(0, 'init', 'layers.3')."""
    text = "/".join([str(root), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
