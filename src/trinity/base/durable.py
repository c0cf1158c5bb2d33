"""Files that survive a kill or a full disk: written aside, synced, then moved into place in one step.

A folder is `sealed` by a manifest (manifest.json: sha256 and size of every other file). A sealed folder is either
whole and verifiable, or it is recognisably not.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trinity.base.errors import StorageError, VerificationError
from trinity.base.units import show_bytes

MANIFEST = "manifest.json"


@contextmanager
def refusing_disk(target: Path) -> Iterator[None]:
    """Turn the disk's refusals (full, read-only, quota) while writing `target` into one clear StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent if target.parent.exists() else Path(".")).free
            raise StorageError(
                f"The disk is full: writing {target} failed with {show_bytes(free)} free.",
                "Nothing saved before was touched. Free some space and run the same command again.",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageError(
                f"{target} cannot be written: {error.strerror}.", "Choose a folder you may write to."
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable (a file's own fsync does not cover its directory entry)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole: after a kill at any moment the path holds the old content or the new, never a part."""
    with refusing_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
        try:
            with aside.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    write_durably(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def folder_aside(final: Path) -> Iterator[Path]:
    """Build a folder aside and move it into place when the block ends well; on an error nothing of it remains.

    The folder is sealed with a manifest and synced before the move. An existing folder at `final` is replaced.
    """
    aside = final.with_name(f".{final.name}.writing-{os.getpid()}")
    with refusing_disk(final):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            seal(aside)
            for path in aside.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            sync_folder(aside)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if final.exists():
            retired = final.with_name(f".{final.name}.retired-{os.getpid()}")
            os.replace(final, retired)
            os.replace(aside, final)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.replace(aside, final)
        sync_folder(final.parent)


def listed_files(folder: Path, ignore: tuple[str, ...] = ()) -> list[str]:
    """Relative names of the files a manifest covers: all of them but the manifest itself and what is ignored."""
    return sorted(
        name
        for path in folder.rglob("*")
        if path.is_file() and (name := path.relative_to(folder).as_posix()) != MANIFEST and name not in ignore
    )


def seal(folder: Path, ignore: tuple[str, ...] = ()) -> None:
    """Write the folder's manifest: the sha256 and size in bytes of every other file in it."""
    files = {
        name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in listed_files(folder, ignore)
    }
    write_json(folder / MANIFEST, {"files": files})


def unsealed_differences(folder: Path, ignore: tuple[str, ...] = ()) -> list[str]:
    """What differs from the manifest, one sentence a file; empty when every byte is as it was sealed."""
    try:
        promised = {
            name: (entry["sha256"], entry["bytes"])
            for name, entry in json.loads((folder / MANIFEST).read_text())["files"].items()
        }
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is not a manifest"]
    differences = []
    for name, (sha256, size) in promised.items():
        path = folder / name
        if not path.is_file():
            differences.append(f"{name} is missing")
        elif path.stat().st_size != size:
            differences.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
        elif sha256_file(path) != sha256:
            differences.append(f"{name} was altered (sha256 differs)")
    extra = set(listed_files(folder, ignore)) - set(promised)
    return differences + [f"{name} is not in the manifest" for name in sorted(extra)]


def verify_seal(folder: Path, ignore: tuple[str, ...] = ()) -> None:
    """Raise VerificationError naming every file that is missing, altered, or unexpected."""
    differences = unsealed_differences(folder, ignore)
    if differences:
        raise VerificationError(f"{folder} is not what was written: {'; '.join(differences)}.")
