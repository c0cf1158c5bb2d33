"""A checkout in which the README's commands were typed: git offers none of it for a commit, `make clean` takes none."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRITTEN = sorted(
    set(re.findall(r"^\$ trinity .*?(?:--out|--new-key) (\S+)", (ROOT / "README.md").read_text(), re.M))
    | {"keys/me.pem", "page.html", "demo", "runs"}
)


def test_git_ignores_what_the_readme_has_people_write():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    inside = [f"{name}/x" if "." not in name else name for name in WRITTEN]
    done = subprocess.run(["git", "check-ignore", *inside], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert sorted(done.stdout.split()) == sorted(inside) and len(inside) > 8
    tracked = subprocess.run(["git", "ls-files", "-ci", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    assert not tracked.stdout, "nothing of the project itself is ignored"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not here")
def test_make_clean_leaves_what_people_made(tmp_path: Path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("src", "tests", "build", ".pytest_cache"):
        (tmp_path / name).mkdir()
    for name in WRITTEN:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine") if "." in name else (path / "x").mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True, timeout=20)
    assert all((tmp_path / name).exists() for name in WRITTEN)
    assert not (tmp_path / "build").exists()
