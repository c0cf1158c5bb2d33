"""Whether the token folders of a run hold, byte for byte, what their manifests promise.

A fingerprint names what the manifests say; this looks at the bytes. Every file is hashed when a run begins, and later
only where it was touched since: a file is known by its size, its times of change and its inode, and no write leaves the
time of its last status change as it was.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from trinity.base.durable import altered_files, listed_files

Seen = dict[str, list[int]]  # path -> what `_look` says of the file whose bytes were as promised


def altered_data(folders: Sequence[Path], seen: Seen, share: tuple[int, int] = (0, 1)) -> tuple[list[str], Seen]:
    """What differs from the manifests, one sentence a file, and what this call hashed and found as promised.

    share (n, of): this process looks at every `of`-th file from the n-th on. Files in `seen` that were not touched
    since are taken as they were.
    """
    differences: list[str] = []
    found: Seen = {}
    for folder in folders:
        looks = {name: _look(folder / name) for name in listed_files(folder)}
        known = {name for name, look in looks.items() if seen.get(str(folder / name)) == look}

        def hashed(name: str, folder: Path = folder, looks: dict[str, list[int]] = looks) -> None:
            found[str(folder / name)] = looks[name]

        differences += [f"{folder}/{what}" for what in altered_files(folder, share, known, hashed)]
    return differences, found


def read_seen(path: Path) -> Seen:
    """What an earlier start wrote down; nothing where that cannot be read, so that all is hashed again."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _look(path: Path) -> list[int]:
    """Size, times of the last change of bytes and of status in nanoseconds, inode. Taken before the bytes are read."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
