"""Is a release what its publisher sealed? First every byte against the manifest, then the signature over all of it.

Without a key of your own the key inside the folder is used. That shows that nothing was damaged since it was signed; it
does not show by whom, since whoever replaces the files can replace that key as well.
"""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trinity.base.durable import MANIFEST, unsealed_differences
from trinity.base.errors import UsageError, VerificationError
from trinity.release.sign import PUBLIC_KEY, SIGNATURE, check_signature, key_name


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`problems` is empty for a release that holds. `signer` names the key; `trusted` tells whether it was yours."""

    folder: Path
    files: int
    problems: list[str]
    signer: str | None
    trusted: bool

    @property
    def holds(self) -> bool:
        return not self.problems


def verify_release(folder: Path, key: Path | None = None) -> Verdict:
    """Check a release folder, against `key` (a public key, PEM) where one is given."""
    if not folder.is_dir():
        raise UsageError(f"There is no folder at {folder}.", "Name a folder that `trinity release --out` has written.")
    if key is not None and not key.is_file():
        raise UsageError(f"There is no public key at {key}.", "Name the publisher's public key (PEM).")
    problems = _strange_entries(folder)
    if problems:  # nothing of such a folder is opened: a link may lead anywhere
        return Verdict(folder=folder, files=0, problems=problems, signer=None, trusted=False)
    names, problems = _promised(folder)
    problems += _strange_names(names)
    if key is None and not (folder / PUBLIC_KEY).is_file():
        problems.append(f"{PUBLIC_KEY} is missing, so the signature cannot be checked without --key")
    if problems:
        return Verdict(folder=folder, files=len(names), problems=problems, signer=None, trusted=False)
    problems = unsealed_differences(folder, ignore=(SIGNATURE,))
    public_key, signer = key or folder / PUBLIC_KEY, None
    try:
        check_signature(folder, public_key)
        signer = key_name(public_key.read_bytes())
    except VerificationError as error:
        problems.append(error.what)
    return Verdict(
        folder=folder,
        files=len(names),
        problems=problems,
        signer=signer if not problems else None,
        trusted=key is not None and not problems,
    )


def _strange_entries(folder: Path) -> list[str]:
    """Whatever is neither a plain file nor a folder: links, pipes, devices. A release has none."""
    found = []
    for place, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(place) / name
            mode = path.lstat().st_mode
            shown = path.relative_to(folder).as_posix()
            if stat.S_ISLNK(mode):
                found.append(f"{shown} is a symbolic link, which a release never holds")
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                found.append(f"{shown} is neither a file nor a folder")
    return found


def _strange_names(names: list[str]) -> list[str]:
    """Names in the manifest that lead out of the folder."""
    return [
        f"{MANIFEST} names {name!r}, which is outside the release"
        for name in names
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
    ]


def _promised(folder: Path) -> tuple[list[str], list[str]]:
    """(names the manifest lists, what is wrong with the manifest itself). It may come from anyone."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        if all(isinstance(entry["sha256"], str) and isinstance(entry["bytes"], int) for entry in files.values()):
            return list(files), []
    except FileNotFoundError:
        return [], [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return [], [f"{MANIFEST} is not a manifest"]
