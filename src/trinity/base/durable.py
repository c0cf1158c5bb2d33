"""Files that survive a kill or a full disk: written aside, synced, then moved into place in one step.

Aside means beside: `.NAME.writing-PID`, and `.NAME.retired-PID` for what NAME held where the system cannot exchange two
folders in one step. `recover` clears away what a killed process left of either. A folder that several processes fill
has a mark of its own behind the number, so that a straggler of a killed run never writes into the folder of the next.

A folder is `sealed` by a manifest (manifest.json: sha256 and size of every other file). A sealed folder is either
whole and verifiable, or it is recognisably not.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypedDict

from trinity.base.errors import StorageError, VerificationError
from trinity.base.progress import Advance, progress
from trinity.base.units import show_bytes

MANIFEST = "manifest.json"
SHOWN_FROM = 2**29  # bytes that take a second or more to hash
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>writing|retired)-(?P<process>[0-9]+)(?:-[0-9a-f]+)?", re.DOTALL)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_NO_MANIFEST = (ValueError, KeyError, TypeError, AttributeError)  # what reading something else as one leads to
_NOT_OFFERED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@contextmanager
def refusing_disk(target: Path) -> Iterator[None]:
    """Turn the disk's refusals (full, read-only, quota) while writing `target` into one clear StorageError.

    A refusal of another path, such as a source that may not be read, stays the OSError that names it.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent if target.parent.exists() else Path(".")).free
            raise StorageError(
                f"The disk is full: writing {target} failed with {show_bytes(free)} free.",
                "Nothing saved before was touched. Free some space and run the same command again.",
            ) from error
        if error.errno == errno.EIO:
            raise StorageError(
                f"The disk failed: writing {target} gave an input/output error.",
                "Nothing saved before was touched. See to the disk and run the same command again.",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and _is_about(error, target):
            raise StorageError(
                f"{target} cannot be written: {error.strerror}.", "Choose a folder you may write to."
            ) from error
        raise


def _is_about(error: OSError, target: Path) -> bool:
    """Whether an error names no path, or one that writing `target` touches: itself, what lies in it or aside of it, or
    a folder it lies in."""
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return True
    named, absolute = Path(os.path.abspath(os.fsdecode(error.filename))), Path(os.path.abspath(target))
    if absolute.is_relative_to(named):
        return True
    first = named.relative_to(absolute.parent).parts[0] if named.is_relative_to(absolute.parent) else ""
    return first == absolute.name or first.startswith(f".{absolute.name}.")


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable (a file's own fsync does not cover its directory entry)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder, and what it lies in, unless they are there; the name of each one made is durable."""
    if not folder.is_dir():
        make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """Make every file of a folder durable, and the names in it and in each folder below."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            sync_file(path)


@contextmanager
def file_aside(final: Path) -> Iterator[Path]:
    """A path to write a file at; it takes the name `final` when the block ends well, and nothing remains on an error.

    After a kill at any moment `final` holds the old content or the new, never a part.
    """
    with refusing_disk(final):
        make_folder(final.parent)
        aside = final.with_name(f".{final.name}.writing-{os.getpid()}")
        try:
            yield aside
            sync_file(aside)
            os.replace(aside, final)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_folder(final.parent)


def write_durably(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole."""
    with file_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def open_to_readers(path: Path) -> None:
    """Give a file that a library made private the mode that the umask, or the folder, gives new files."""
    example = path.with_name(f".{path.name}.writing-{os.getpid()}")
    example.touch()
    try:
        path.chmod(stat.S_IMODE(example.stat().st_mode))
    finally:
        example.unlink()


def write_json(path: Path, value: object) -> None:
    write_durably(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_file(path: Path, advance: Advance = lambda _: None) -> str:
    """Of a file's bytes. `advance` is told how many were read, some at a time."""
    digest, block = hashlib.sha256(), memoryview(bytearray(2**18))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            advance(count)
    return digest.hexdigest()


def _hashing(label: str, waiting: int) -> AbstractContextManager[Advance]:
    """Progress of so many bytes, where they take long enough to show it."""
    return progress(label, waiting) if waiting >= SHOWN_FROM else nullcontext(lambda _: None)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def folder_aside(final: Path) -> Iterator[Path]:
    """Build a folder aside and move it into place when the block ends well; on an error nothing of it remains.

    The folder is sealed with a manifest and synced before the move. An existing folder at `final` is replaced.
    """
    with refusing_disk(final):
        aside = begin_aside(final)
        try:
            yield aside
            finish_aside(aside, final)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def begin_aside(final: Path) -> Path:
    """A new empty folder beside `final`, for this process or several to fill. What a kill left there before goes."""
    recover(final.parent, final.name)
    aside = final.with_name(f".{final.name}.writing-{os.getpid()}-{secrets.token_hex(4)}")
    make_folder(final.parent)
    aside.mkdir()
    return aside


def finish_aside(aside: Path, final: Path, known: dict[str, "Sealed"] | None = None) -> None:
    """Seal and sync what was written aside, and let it take its name. `known`: entries hashed already."""
    seal(aside, known=known)
    sync_tree(aside)
    move_into_place(aside, final)


def move_into_place(aside: Path, final: Path) -> None:
    """Let the synced folder `aside` take the name `final`; what was there goes only once the new name is durable."""
    old = aside
    if not os.path.lexists(final):
        os.replace(aside, final)
    elif not exchange(aside, final):
        old = final.with_name(f".{final.name}.retired-{os.getpid()}")
        os.replace(final, old)
        try:
            os.replace(aside, final)
        except OSError:
            os.replace(old, final)
            raise
    sync_folder(final.parent)
    _remove(old)


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or its file system cannot (all but Linux; NFS)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_OFFERED:
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))


def recover(folder: Path, name: str | None = None, alone: bool = False) -> None:
    """Mend what killed processes left in `folder`, or beside one name of it: half-written things go, and what a name
    held comes back where nothing has taken its place. `alone` says that no process still writes here."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = _LEFTOVER.fullmatch(path.name)
        if not found or name not in (None, found["name"]) or (not alone and _at_work(int(found["process"]))):
            continue
        final = folder / found["name"]
        if found["kind"] == "retired" and not os.path.lexists(final):
            os.replace(path, final)
        else:
            _remove(path)


def _at_work(process: int) -> bool:
    """Whether another process of that number lives. This one has left nothing that it still works on."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process not in (0, os.getpid())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def listed_files(folder: Path, ignore: tuple[str, ...] = ()) -> list[str]:
    """Relative names of the files a manifest covers: all of them but the manifest itself and what is ignored."""
    return sorted(
        name
        for path in folder.rglob("*")
        if path.is_file() and (name := path.relative_to(folder).as_posix()) != MANIFEST and name not in ignore
    )


class Sealed(TypedDict):
    """What a manifest says of one file."""

    sha256: str
    bytes: int


def sealed(path: Path, advance: Advance = lambda _: None) -> Sealed:
    """The manifest's entry of one file as it is now."""
    return {"sha256": sha256_file(path, advance), "bytes": path.stat().st_size}


def seal(folder: Path, ignore: tuple[str, ...] = (), known: dict[str, Sealed] | None = None) -> None:
    """Write the folder's manifest: the sha256 and size in bytes of every other file in it.

    `known` holds entries that were made already, by relative name; files that are not there are hashed here.
    """
    known = known or {}
    # A network disk keeps what was removed while open as .nfs..., until it is closed: sealed, it would be missed later.
    found = {name for name in listed_files(folder, ignore) if not name.rsplit("/", 1)[-1].startswith(".nfs")}
    new = sorted(found - {*known})
    with _hashing(f"sealing {folder.name}", sum((folder / name).stat().st_size for name in new)) as advance:
        made = {name: sealed(folder / name, advance) for name in new}
    write_json(folder / MANIFEST, {"files": dict(sorted((made | known).items()))})


def unsealed_differences(folder: Path, ignore: tuple[str, ...] = ()) -> list[str]:
    """What differs from the manifest, one sentence a file; empty when every byte is as it was sealed and no file more
    is there."""
    changed = altered_files(folder)
    try:
        return changed + [f"{name} is not in the manifest" for name in strange_files(folder, ignore)]
    except (OSError, *_NO_MANIFEST):
        return changed


def altered_files(
    folder: Path,
    share: tuple[int, int] = (0, 1),
    known: Collection[str] = (),
    hashed: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """What is missing or not as the manifest says, one sentence a file.

    `share` (n, of): look at every `of`-th file from the n-th on, largest first, where several processes share the work.
    `known`: files whose bytes need no look; `hashed` hears of each whose bytes were looked at and are as promised.
    The first process shows how far it is, where that takes long.
    """
    try:
        promised = _promised(folder)
        ordered = sorted(promised, key=lambda name: (-promised[name][1], name))
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except _NO_MANIFEST:
        return [f"{MANIFEST} is not a manifest"]
    ours, differences = ordered[share[0] :: share[1]], []
    waiting = sum(promised[name][1] for name in ours if name not in known)
    with _hashing(f"checking {folder.name}", waiting if share[0] == 0 else 0) as advance:
        for name in ours:
            sha256, size = promised[name]
            path = folder / name
            if not path.is_file():
                differences.append(f"{name} is missing")
            elif path.stat().st_size != size:
                differences.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
            elif name in known:
                continue
            elif sha256_file(path, advance) != sha256:
                differences.append(f"{name} was altered (sha256 differs)")
            else:
                hashed(name)
    return differences


def strange_files(folder: Path, ignore: tuple[str, ...] = ()) -> list[str]:
    """Relative names of the files that the manifest, which must be one, does not name."""
    return sorted(set(listed_files(folder, ignore)) - set(_promised(folder)))


def _promised(folder: Path) -> dict[str, tuple[str, int]]:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return {name: (entry["sha256"], entry["bytes"]) for name, entry in files.items()}


def verify_seal(folder: Path, ignore: tuple[str, ...] = ()) -> None:
    """Raise VerificationError naming every file that is missing, altered, or unexpected."""
    differences = unsealed_differences(folder, ignore)
    if differences:
        raise VerificationError(f"{folder} is not what was written: {'; '.join(differences)}.")
