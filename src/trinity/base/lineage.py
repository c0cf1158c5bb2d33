"""Where a thing came from: stable fingerprints, and a parent-to-child record that travels with every artefact."""

import hashlib
import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trinity.base.durable import sha256_file, write_json

LINEAGE = "lineage.json"
_CODE = (".py", ".cpp", ".h")


def fingerprint(value: Any) -> str:
    """A 16-digit name for a JSON-like value; equal values have equal names on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def source_files() -> dict[str, str]:
    """What this package does: the sha256 of each of its source files, by relative name, as read when first asked.

    Neither git nor the version number says it: git may be absent or slow, and both are blind to some edits.
    """
    package = Path(__file__).parents[1]
    files = sorted(path for path in package.rglob("*") if path.suffix in _CODE)
    return {path.relative_to(package).as_posix(): sha256_file(path) for path in files}


def code_version() -> dict[str, str]:
    """The package version and, in a working copy, the git commit (with '+changes' when it is not clean)."""
    try:
        found = {"trinity": version("trinity")}
    except PackageNotFoundError:
        found = {"trinity": "source"}
    # An installed package may lie inside a repository of something else; that one's commit says nothing about us.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is not None:
        commit, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
        if commit is not None and changes is not None:
            found["commit"] = commit + ("+changes" if changes else "")
    return found


def _git(*arguments: str) -> str | None:
    """What git says where this file lies; None without git, outside of a repository, or when it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment() -> dict[str, str]:
    """Versions that a number may depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    for package in ("torch", "numpy", "tokenizers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_lineage(folder: Path, kind: str, parents: dict[str, Any], made_by: dict[str, Any]) -> None:
    """Record beside an artefact what it was made from (`parents`: name -> fingerprint or hash) and by what."""
    write_json(
        folder / LINEAGE,
        {"kind": kind, "parents": parents, "made_by": made_by, "code": code_version(), "environment": environment()},
    )


def read_lineage(folder: Path) -> dict[str, Any]:
    """The lineage record of a folder, or an empty one where none was written."""
    path = folder / LINEAGE
    return json.loads(path.read_text()) if path.exists() else {}
