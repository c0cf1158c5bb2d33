"""Every number that can be set has bounds, and a value outside them is refused in one line naming all three."""

import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass, replace
from typing import get_type_hints

import pytest

import trinity.config
from trinity.base.errors import ConfigError
from trinity.config.align import AlignConfig
from trinity.config.audit import AuditConfig
from trinity.config.engine import EngineLimits
from trinity.config.knob import Bounds, Settings
from trinity.config.load import from_dict, override, to_dict
from trinity.config.parallel import ParallelConfig
from trinity.config.phases import ExtensionConfig, PhaseConfig
from trinity.config.serve import ServeConfig
from trinity.recipes.table import recipe

DEBUG = recipe("debug")
WHOLE = [DEBUG, DEBUG.model, DEBUG.data, DEBUG.optim, DEBUG.balance, DEBUG.train, AlignConfig(), AuditConfig(),
         EngineLimits(), ServeConfig(), PhaseConfig(name="a", from_tokens=0), ExtensionConfig(),
         ParallelConfig()]  # fmt: skip

# Numbers without bounds, each with the reason why any finite one will do.
FREE = dict.fromkeys(("train.seed", "align.seed", "seed"), "any whole number names a stream of randomness")


def numbers() -> list[tuple[Settings, Field, str, type]]:
    """(a good config, one of its numeric fields, the field as messages write it, int or float) for every number."""
    return [
        (config, field, config.written(field.name), hint)
        for config in WHOLE
        for field in fields(config)
        if (hint := get_type_hints(type(config))[field.name]) in (int, float)
    ]


def beyond(bounds: Bounds, hint: type) -> list[float]:
    """The values nearest to the bounds that lie outside of them."""
    down: Callable[[float], float] = (lambda b: b - 1) if hint is int else (lambda b: math.nextafter(b, -math.inf))
    up: Callable[[float], float] = (lambda b: b + 1) if hint is int else (lambda b: math.nextafter(b, math.inf))
    near = [down(bounds.low), up(bounds.high), bounds.above, bounds.below]
    return [hint(value) for value in near if math.isfinite(value)]


NUMBERS = numbers()
IDS = [f"{type(config).__name__}.{field.name}" for config, field, _, _ in NUMBERS]


def test_every_config_class_is_walked():
    kinds = {
        value
        for module in pkgutil.iter_modules(trinity.config.__path__, "trinity.config.")
        for value in vars(importlib.import_module(module.name)).values()
        if isinstance(value, type) and is_dataclass(value) and value is not Settings
    }
    assert kinds == {type(config) for config in WHOLE}
    assert all(issubclass(kind, Settings) for kind in kinds)


@pytest.mark.parametrize(("config", "field", "written", "hint"), NUMBERS, ids=IDS)
def test_every_number_has_bounds_or_a_reason(config: Settings, field: Field, written: str, hint: type):
    bounded = max(field.metadata["bounds"].low, field.metadata["bounds"].above) > -math.inf
    assert bounded != (written in FREE), f"{written}: declare bounds, or in FREE the reason why it has none"
    assert field.metadata["bounds"].hold(getattr(config, field.name))


@pytest.mark.parametrize(("config", "field", "written", "hint"), NUMBERS, ids=IDS)
def test_a_value_outside_is_refused_in_one_line(config: Settings, field: Field, written: str, hint: type):
    for value in beyond(field.metadata["bounds"], hint):
        for build in (
            lambda value=value: replace(config, **{field.name: value}),
            lambda value=value: from_dict(type(config), {**to_dict(config), field.name: value}),
            lambda value=value: override(config, [f"{field.name}={value!r}"]),
        ):
            with pytest.raises(ConfigError) as caught:
                build()
            told = str(caught.value)
            assert told == f"{written} is {value}. It must be {field.metadata['bounds']}." and "\n" not in told


@pytest.mark.parametrize(("config", "field", "written", "hint"), NUMBERS, ids=IDS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_no_setting_is_infinite_or_not_a_number(config: Settings, field: Field, written: str, hint: type, value: float):
    with pytest.raises(ConfigError, match=rf"{written} is {value}. It must be finite"):
        replace(config, **{field.name: value})
    with pytest.raises(ConfigError, match=rf"{written}|{field.name}"):
        from_dict(type(config), {**to_dict(config), field.name: value})
    with pytest.raises(ConfigError, match=rf"{written}|{field.name}"):
        override(config, [f"{field.name}={'-1e999' if value < 0 else '1e999'}"])


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("optim.clip_norm=-1", "optim.clip_norm is -1.0. It must be at least 0."),
        ("optim.muon_momentum=1.5", "optim.muon_momentum is 1.5. It must be at least 0 and below 1."),
        ("optim.muon_lr=1e999", "optim.muon_lr is inf. It must be finite and above 0."),
        (f"optim.muon_lr={10**400}", "'optim.muon_lr' has 401 digits. Write a number, such as 0.02."),
        ("optim.adamw_beta1=1.5", "optim.adamw_beta1 is 1.5. It must be at least 0 and below 1."),
        ("balance.z_loss=-1", "balance.z_loss is -1.0. It must be at least 0."),
        ("train.spike_sigmas=-1", "train.spike_sigmas is -1.0. It must be at least 0."),
        ("optim.decay_tokens=-1", "optim.decay_tokens is -1. It must be at least 0."),
    ],
)
def test_nonsense_is_told_as_it_was_typed(setting: str, told: str):
    with pytest.raises(ConfigError) as caught:
        override(DEBUG, [setting])
    assert str(caught.value) == told


def test_what_switches_something_off_stays_allowed():
    off = ["optim.clip_norm=0", "optim.decay_tokens=0", "optim.warmup_tokens=0", "balance.z_loss=0",
           "train.spike_sigmas=0", "train.save_every_tokens=0", "train.sample_tokens=0"]  # fmt: skip
    assert override(DEBUG, off).optim.clip_norm == 0.0


def test_bounds_speak():
    assert str(Bounds(low=0, below=1)) == "at least 0 and below 1"
    assert str(Bounds(low=1, high=99)) == "at least 1 and at most 99"
    assert str(Bounds()) == "" and Bounds().hold(-5) and not Bounds().hold(math.nan)
