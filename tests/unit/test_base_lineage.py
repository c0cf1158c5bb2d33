"""The commit in a lineage record is the one of this code, never of a repository that it happens to lie in."""

import shutil
import subprocess
from pathlib import Path

import pytest

from trinity.base import lineage
from trinity.base.lineage import code_version, source_files

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's repository with one commit, and our module lying in it untracked."""
    monkeypatch.setattr(lineage, "__file__", str(tmp_path / "site-packages" / "lineage.py"))
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "lineage.py").write_text("ours")
    (tmp_path / "theirs.txt").write_text("theirs")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path, "theirs.txt")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(folder: Path, file: str) -> None:
    git(folder, "add", file)
    git(folder, "commit", "--quiet", "-m", file)


def test_the_commit_of_another_repository_is_not_ours(repository: Path):
    assert set(code_version()) == {"trinity"}


def test_a_working_copy_names_its_commit_and_whether_it_is_clean(repository: Path):
    commit(repository, "site-packages/lineage.py")
    head = git(repository, "rev-parse", "--short=12", "HEAD")
    assert code_version()["commit"] == head
    (repository / "theirs.txt").write_text("changed")
    assert code_version()["commit"] == f"{head}+changes"


def test_without_a_repository_or_git_there_is_no_commit(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert set(code_version()) == {"trinity"}
    monkeypatch.undo()
    monkeypatch.setattr(lineage, "__file__", "/lineage.py")
    assert set(code_version()) == {"trinity"}


def test_an_edited_source_file_is_other_code_with_or_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("base/lineage.py", "kernels/matmul.cpp", "kernels/matmul.h", "base/lineage.pyc", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(lineage, "__file__", str(tmp_path / "base" / "lineage.py"))
    monkeypatch.setenv("PATH", "")
    before = source_files.__wrapped__()
    assert list(before) == ["base/lineage.py", "kernels/matmul.cpp", "kernels/matmul.h"]
    (tmp_path / "kernels" / "matmul.h").write_text("edited")
    (tmp_path / "base" / "lineage.pyc").write_text("compiled anew")
    after = source_files.__wrapped__()
    assert [name for name in after if after[name] != before[name]] == ["kernels/matmul.h"]
