"""Strict configuration: what is written comes back, what is unknown is refused with the nearest name."""

import json
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.base.errors import ConfigError, TrinityError, UsageError
from trinity.config.load import config_fingerprint, differences, from_dict, override, to_dict
from trinity.config.model import ModelConfig
from trinity.config.phases import ExtensionConfig, PhaseConfig
from trinity.config.run import RunConfig
from trinity.config.train import TrainConfig
from trinity.recipes.table import RECIPES, recipe


def paths(config: Any, where: str = "") -> list[tuple[str, Any]]:
    found = []
    for field in fields(config):
        value, name = getattr(config, field.name), f"{where}{field.name}"
        if isinstance(value, tuple):
            found += [path for number, entry in enumerate(value) for path in paths(entry, f"{name}.{number}.")]
        else:
            found += paths(value, f"{name}.") if is_dataclass(value) else [(name, value)]
    return found


PHASES = (
    PhaseConfig(name="wide", from_tokens=8192, batch_tokens=2048),
    PhaseConfig(name="late", from_tokens=20480, mix="folder"),
)
DEBUG = replace(
    recipe("debug"), phases=PHASES, extension=ExtensionConfig(tokens=4096, sequence_length=256, batch_tokens=1024)
)
PATHS = paths(DEBUG)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_dict(name: str):
    config = recipe(name)
    assert from_dict(RunConfig, to_dict(config)) == config
    assert differences(to_dict(config), to_dict(recipe(name))) == []


@pytest.mark.parametrize(("path", "value"), PATHS, ids=[path for path, _ in PATHS])
def test_every_setting_can_be_written_as_text(path: str, value: object):
    assert override(DEBUG, [f"{path}={value}"]) == DEBUG


@given(st.sampled_from([path for path, _ in PATHS]), st.integers(0, 30), st.sampled_from("abcxyz"))
def test_a_mistyped_key_is_refused_by_name(path: str, place: int, letter: str):
    wrong = path[: place % len(path)] + letter + path[place % len(path) + 1 :]
    known = {path for path, _ in PATHS}
    if wrong not in known:
        with pytest.raises(TrinityError) as caught:
            override(DEBUG, [f"{wrong}=1"])
        assert caught.value.exit_code == 2 and caught.value.remedy


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.tokns=5", "Did you mean 'tokens'?"),
        ("trian.tokens=5", "Did you mean 'train'?"),
        ("train.tokens=many", "'train.tokens' must be int, not 'many'"),
        ("train.tokens=1.5", "must be int"),
        ("train.tokens=true", "'train.tokens' must be int, not 'true'"),
        ("train.tokens=0", "must be at least 1"),
        ("train.spike_action=explode", "cannot be 'explode'"),
        ("data.intra_document_mask=maybe", "must be bool"),
        ("data.intra_document_mask=1", "must be bool"),
        ("train=5", "is a section"),
        ("train.tokens.more=5", "holds a single value"),
        ("model.head_dim=15", "even head size"),
        ("model.num_key_value_heads=3", "cannot be shared evenly"),
        (
            "train.batch_tokens=1000",
            "not a whole number of microbatches.*batch_tokens 512 or 1024, a multiple",
        ),
        ("train.batch_tokens=100", "Make its batch_tokens 512, a multiple"),
        ("tokens=5", "Unknown key 'tokens'. Did you mean 'train.tokens' or 'extension.tokens'?"),
        ("muon_lr=0.1", "Did you mean 'optim.muon_lr'?"),
        ("optim.warmup_tokens=1M", r"Warm-up .optim.warmup_tokens, 1000000. and decay .optim.decay_tokens, "),
        ("model.max_position_embeddings=64", "longer than the model's context"),
        ("phases=5", "is a list of sections.*phases.0.name"),
        ("phases.0=5", "'phases.0' is a section"),
        ("phases.2.mix=x", "There is no 'phases.2'; 'phases' has 2 entries"),
        ("phases.one.mix=x", "There is no 'phases.one'"),
        ("phases.0.batch=1K", "Unknown key 'phases.0.batch'. Did you mean 'batch_tokens'?"),
        ("phases.0.name.first=x", "'phases.0.name' holds a single value"),
        ("phases.1.from_tokens=8192", "Phases 'wide' and 'late' both begin at the step after 8,192 tokens"),
        ("phases.1.from_tokens=4096", "both begin at the step after 8,192 tokens"),
        ("phases.1.from_tokens=65536", "which the run of 65,536 never reaches"),
        ("phases.1.name=wide", "The name 'wide' of phases.1 is taken"),
        ("phases.1.name=extension", "The name 'extension' of phases.1 is taken"),
        ("phases.0.name=", "The name '' of phases.0 is empty"),
        ("phases.0.batch_tokens=1000", "not a whole number of microbatches.*phase 'wide'"),
        ("extension.sequence_length=0", "has no extension.sequence_length"),
        ("extension.batch_tokens=0", "has no extension.batch_tokens"),
        ("extension.batch_tokens=1000", "phase 'extension'.*extension.microbatch_rows"),
        ("phases.1.keep=base", "phases.1.keep is 'base'"),
        ("phases.1.keep=step-00000001", "phases.1.keep is 'step-00000001'"),
        ("phases.1.keep=../x", "phases.1.keep is '../x'"),
        ("phases.0.from_tokens=0", "begins the run and has tokens in a step of its own"),
        ("extension.warmup_tokens=5000", "does not fit a context extension of 4096"),
        ("extension.final_lr_fraction=0.2", "above its highest, 0.1"),
    ],
)
def test_bad_settings_say_what_and_why(setting: str, told: str):
    with pytest.raises(UsageError, match=told):
        override(DEBUG, [setting])


def test_a_setting_without_a_value_is_a_usage_error():
    with pytest.raises(UsageError, match="is not a setting"):
        override(DEBUG, ["train.tokens"])


def test_counts_take_prefixes_and_later_settings_win():
    changed = override(DEBUG, ["train.tokens=1M", "train.tokens=64K", "optim.muon_lr=1"])
    assert changed.train.tokens == 64_000 and changed.optim.muon_lr == 1.0
    assert type(changed.optim.muon_lr) is float


def test_the_given_config_is_left_alone():
    before = config_fingerprint(DEBUG)
    override(DEBUG, ["train.seed=5"])
    assert config_fingerprint(DEBUG) == before


def test_dicts_with_unknown_missing_or_misplaced_keys():
    whole = to_dict(DEBUG)
    with pytest.raises(ConfigError, match="Unknown key 'train.toknes'"):
        from_dict(RunConfig, {**whole, "train": {**whole["train"], "toknes": 1}})
    with pytest.raises(ConfigError, match="train. is incomplete"):
        from_dict(RunConfig, {**whole, "train": {"seed": 0}})
    with pytest.raises(ConfigError, match="must be a table"):
        from_dict(RunConfig, {**whole, "train": 5})
    with pytest.raises(ConfigError, match="'phases' must be a list of tables"):
        from_dict(RunConfig, {**whole, "phases": 5})
    with pytest.raises(ConfigError, match="'phases.0' must be a table"):
        from_dict(RunConfig, {**whole, "phases": [5]})
    with pytest.raises(ConfigError, match="phases.0. is incomplete"):
        from_dict(RunConfig, {**whole, "phases": [{"name": "x"}]})


def test_fingerprints_follow_values_and_nothing_else():
    assert config_fingerprint(recipe("debug")) == config_fingerprint(recipe("debug"))
    assert config_fingerprint(override(DEBUG, ["train.seed=1"])) != config_fingerprint(DEBUG)
    shuffled = from_dict(RunConfig, dict(reversed(to_dict(DEBUG).items())))
    assert config_fingerprint(shuffled) == config_fingerprint(DEBUG)


def test_differences_are_named_with_both_values():
    changed = override(DEBUG, ["train.seed=1", "model.rope_theta=5e5"])
    assert differences(to_dict(DEBUG), to_dict(changed)) == [
        "model.rope_theta: 10000.0 -> 500000.0",
        "train.seed: 0 -> 1",
    ]
    changed = replace(DEBUG, phases=(replace(PHASES[0], mix="other"),))
    found = differences(json.loads(json.dumps(to_dict(DEBUG))), to_dict(changed))
    assert found[0] == "phases.0.mix:  -> other" and found[1].startswith("phases.1: {") and len(found) == 2


@pytest.mark.parametrize("kind", [ModelConfig, TrainConfig])
def test_configs_cannot_be_changed(kind: type):
    section = {ModelConfig: DEBUG.model, TrainConfig: DEBUG.train}[kind]
    with pytest.raises(AttributeError):
        setattr(section, fields(kind)[0].name, 5)
