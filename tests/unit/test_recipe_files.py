"""Recipe files: what is written is read back, what is wrong is named by its line, the example lives."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from trinity.base.errors import ConfigError
from trinity.base.run import read_lines
from trinity.cli.main import main
from trinity.config.phases import ExtensionConfig, PhaseConfig
from trinity.recipes.file import write_recipe
from trinity.recipes.table import RECIPES, recipe

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


@pytest.mark.parametrize("name", RECIPES)
def test_a_written_recipe_is_read_back_to_the_same(name: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = Path("elsewhere") / f"{name}.toml"
    assert main(["train", name, "--write-recipe", str(path)]) == 0
    assert recipe(str(path)) == recipe(name)
    assert "--out RUN" in capsys.readouterr().out
    written = path.read_text()
    assert "tokens to train on" in written and written.count("[[phases]]") == len(recipe(name).phases)


def test_every_kind_of_value_is_read_back(tmp_path: Path):
    odd = replace(
        recipe("debug"),
        name='quotes " and \\ and \n a line, ümlaut',
        phases=(PhaseConfig(name="a = [b]", from_tokens=2048, mix=str(tmp_path / "x y")),),
        extension=ExtensionConfig(tokens=1, sequence_length=128, batch_tokens=1024, high_lr_fraction=1e-7),
    )
    write_recipe(odd, tmp_path / "odd.toml")
    assert recipe(str(tmp_path / "odd.toml")) == odd


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_a_file_changes_what_it_writes_and_nothing_else(tmp_path: Path):
    found = recipe(write(tmp_path, 'base = "debug"\n[train]\ntokens = "48K"\nseed = 3\n'))
    debug = recipe("debug")
    assert found == replace(debug, name="mine", train=replace(debug.train, tokens=48_000, seed=3))
    phased = recipe(write(tmp_path, 'base = "large"\nphases = []\n[extension]\ntokens = 0\n'))
    assert phased.phases == () and phased.extension.mix == "mixes/large-long", "a base's own paths stay as they are"


def test_paths_begin_where_the_file_lies(tmp_path: Path, monkeypatch):
    text = 'base="debug"\n[[phases]]\nname="a"\nfrom_tokens="8K"\nmix="../data"\n[extension]\nmix="/far/long"\n'
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    found = recipe("recipes/mine.toml")
    assert found.phases[0].mix == "data" and found.extension.mix == "/far/long"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base = 'debug'\n[train]\nseed = 1\ntokns = 5\n", "mine.toml, line 4: Unknown key 'train.tokns'. Did"),
        ("base = 'debug'\n\n[trian]\nseed = 1\n", "line 3: Unknown key 'trian'. Did you mean 'train'"),
        ("base = 'debgu'\n", "line 1: Unknown recipe 'base' = 'debgu'. Did you mean 'debug'"),
        ("base = 'debug'\n[train]\n\ntokens = 'many'\n", "line 4: 'train.tokens' must be int, not 'many'"),
        ("base = 'debug'\n[train]\ntokens = 0\n", "line 3: train.tokens is 0"),
        ("base = 'debug'\n[[phases]]\nname='a'\nfrom_tokens=4096\n[[phases]]\nname='b'\nfrom_tokns=9000\n",
         "line 7: Unknown key 'phases.1.from_tokns'. Did you mean 'from_tokens'"),
        ("base = 'debug'\n[[phases]]\nname='a'\n", r"line 2: phases.0. is incomplete: .*from_tokens"),
        ("base = 'debug'\nphases = 5\n", "line 2: 'phases' must be a list of tables"),
        ("base = 'debug'\ntrain = 5\n", "line 2: 'train' must be a table"),
        ("base = 'debug'\n[[phases]]\nname='a'\nfrom_tokens=9\n[[phases]]\nname='b'\nfrom_tokens=8\n",
         "mine.toml: Phases 'a' and 'b' both begin"),
        ("[train]\ntokens = 5\n", "mine.toml.*incomplete"),
        ("base = 'debug'\nx 5\n", "mine.toml is not TOML: .*at line 2"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_file_and_line(tmp_path: Path, text: str, told: str):
    with pytest.raises(ConfigError, match=told):
        recipe(write(tmp_path, text))


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, capsys):
    assert main(["train", str(tmp_path / "nowhere.toml"), "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "There is no recipe file" in told and "--write-recipe" in told and "Errno" not in told
    (tmp_path / "folder.toml").mkdir()
    assert main(["train", str(tmp_path / "folder.toml"), "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "folder.toml cannot be read as a recipe: Is a directory." in told and "Errno" not in told
    assert main(["train", "debug", "--write-recipe", str(tmp_path / "recipe")]) == 2
    assert "Let it end in .toml" in capsys.readouterr().err


def test_the_example_of_the_guide_lives_its_whole_life(tmp_path: Path, monkeypatch, capsys):
    """The guide's first block, word for word, in a copy of what it reads."""
    root = GUIDES.parents[1]
    for part in ("docs", "src"):
        shutil.copytree(root / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```console\n(.*?)```", (GUIDES / "recipes.md").read_text(), re.DOTALL)
    assert block
    for line in block[1].splitlines():
        command = shlex.split(line.removeprefix("$ trinity "))
        assert main(command) == 0, (line, capsys.readouterr().err)
    checkpoints = tmp_path / "life" / "run" / "checkpoints"
    named = {path.name: json.loads((path / "state.json").read_text())["tokens"] for path in checkpoints.glob("*[a-z]/")
             if path.name in ("pre-anneal", "base", "context-extended")}  # fmt: skip
    life = recipe(str(tmp_path / "docs" / "guides" / "life.toml"))
    assert named == life.named_checkpoints and set(named) == {"pre-anneal", "base", "context-extended"}
    lines = list(read_lines(tmp_path / "life" / "run" / "metrics.jsonl"))
    begun = [(line["name"], line["batch_tokens"], line["corpus"]) for line in lines if line["kind"] == "phase"]
    assert begun == [("wide steps", 1024, 0), ("prose and code", 1024, 1), ("extension", 1024, 2)]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.5
