"""The stretches of a run that cost alike: phases of one batch and one row length, each planned as a run of its own."""

from dataclasses import replace
from typing import NamedTuple

from trinity.config.phases import ExtensionConfig, Phase
from trinity.config.run import RunConfig


class Stage(NamedTuple):
    """Neighbouring phases that differ in their data alone, as one run without phases."""

    name: str
    run: RunConfig


def stages(run: RunConfig) -> list[Stage]:
    """A batch ramp and a context extension begin a new stage; another mix does not. Each may have its own layout, since
    a resume may change it."""
    groups: list[list[Phase]] = []
    for phase in run.course:
        if groups and _costs_as(groups[-1][-1]) == _costs_as(phase):
            groups[-1].append(phase)
        else:
            groups.append([phase])
    names = [", ".join(phase.name for phase in group) for group in groups]
    alone = len(groups) == 1
    return [
        Stage(name, _as_run(run, group, run.name if alone else f"{run.name}, {name}"))
        for name, group in zip(names, groups, strict=True)
    ]


def _costs_as(phase: Phase) -> tuple[int, int, int]:
    return phase.batch_tokens, phase.sequence_length, phase.microbatch_rows


def _as_run(run: RunConfig, group: list[Phase], name: str) -> RunConfig:
    first = group[0]
    return replace(
        run,
        name=name,
        phases=(),
        extension=ExtensionConfig(),
        data=replace(run.data, sequence_length=first.sequence_length),
        model=replace(  # an extension may train on rows beyond the context the model is meant for
            run.model, max_position_embeddings=max(run.model.max_position_embeddings, first.sequence_length)
        ),
        optim=replace(run.optim, warmup_tokens=0, decay_tokens=0),
        train=replace(
            run.train,
            tokens=group[-1].end - first.begin,
            batch_tokens=first.batch_tokens,
            microbatch_rows=first.microbatch_rows,
        ),
    )
