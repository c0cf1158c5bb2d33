"""The planner's headline, its search, its bounds and its complaints."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import UsageError
from trinity.cli import plan as plan_command
from trinity.cli.main import main
from trinity.cli.plan_figures import figures
from trinity.config.load import override, to_dict
from trinity.config.phases import ExtensionConfig, PhaseConfig
from trinity.plan.assumptions import Assumptions
from trinity.plan.cost import Cost, members_in_server, roofline, run_cost
from trinity.plan.experts import expert_load
from trinity.plan.fit import best_fit, fit_of, smallest_cluster
from trinity.plan.hardware import DEVICES, Cluster, parse_cluster
from trinity.plan.layout import Layout
from trinity.plan.stages import stages
from trinity.plan.wire import transfers
from trinity.recipes.table import RECIPES, recipe

USUAL = Assumptions()


def cost_of(name: str, cluster: str, assumptions: Assumptions = USUAL, **changes: Any) -> Cost:
    """All of train.tokens at the steps that most of them take, without a context extension."""
    run = recipe(name)
    train = replace(run.train, batch_tokens=run.batch_at(run.base_end - 1))
    run = replace(run, train=train, phases=(), extension=ExtensionConfig())
    found = parse_cluster(cluster)
    found = replace(found, device=replace(found.device, **changes))
    fit = best_fit(run, found, assumptions, {})
    return run_cost(run, fit.layout, found, fit.memory, assumptions)


def test_the_published_headline():
    """Trinity Large: 17T tokens on 2,048 B300 in 33 days, for a part of the 20M dollars of the whole effort."""
    cost = cost_of("large", "2048xB300")
    assert cost.days == pytest.approx(33, rel=0.02)
    assert 5e6 < cost.dollars < 20e6
    assert cost.roofline.seconds < cost.step_seconds, "the efficiency, not the roofline, must set the headline"


def test_twice_as_long_on_hopper_follows_from_the_peaks():
    """At the same share of the peak, Hopper takes 2,250 / 989 times as long, and a little for more failures."""
    b300, h100 = cost_of("large", "2048xB300"), cost_of("large", "2048xH100")
    steps = h100.step_seconds / b300.step_seconds
    assert steps == pytest.approx(DEVICES["B300"].bfloat16 / DEVICES["H100"].bfloat16)
    assert 2.0 < h100.days / b300.days < 2.5
    same_peak = cost_of("large", "2048xH100", bfloat16=DEVICES["B300"].bfloat16)
    assert same_peak.step_seconds == pytest.approx(b300.step_seconds)


def test_the_demo_takes_minutes_on_two_cores():
    assert 2 / 1440 < cost_of("demo", "1xCPU").days < 15 / 1440


@pytest.mark.parametrize(
    ("name", "value", "grows"),
    [
        ("failure_hours", 5_000.0, "days"),
        ("restart_minutes", 100.0, "days"),
        ("copy_rate", 1e8, "days"),
        ("power_usage", 2.0, "megawatt_hours"),
    ],
)
def test_every_assumption_moves_what_it_should(name: str, value: float, grows: str):
    usual, worse = cost_of("large", "2048xB300"), cost_of("large", "2048xB300", replace(USUAL, **{name: value}))
    assert getattr(worse, grows) > 1.01 * getattr(usual, grows)
    assert (worse.days > usual.days) == (grows == "days")


def test_overlap_and_usable_memory_matter():
    run, cluster = recipe("large"), parse_cluster("2048xB300")
    layout = best_fit(run, cluster, USUAL, {}).layout
    bounds = [roofline(run, layout, cluster, replace(USUAL, overlap=overlap)).seconds for overlap in (0, 0.5, 1)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[2]
    tight = smallest_cluster(run, DEVICES["B300"], replace(USUAL, usable_memory=0.2), {})
    assert tight is None or tight > (smallest_cluster(run, DEVICES["B300"], USUAL, {}) or 0)


@pytest.mark.parametrize("field", ["bfloat16", "bandwidth", "link", "network"])
def test_better_hardware_never_raises_the_roofline(field: str):
    run, device = recipe("large"), DEVICES["H100"]
    layout = Layout(8, 256, 1, 16, 4, "block", "bfloat16")
    better = replace(device, **{field: 4 * getattr(device, field)})
    old, new = (roofline(run, layout, Cluster(device=d, size=2048), USUAL).seconds for d in (device, better))
    assert new <= old
    if field in ("bfloat16", "network"):
        assert new < old


@given(st.sampled_from(["nano", "mini", "large"]), st.integers(5, 10))
@settings(max_examples=20, deadline=None)
def test_more_devices_are_never_slower_and_never_need_more_memory(name: str, power: int):
    run = recipe(name)
    small, large = (Cluster(device=DEVICES["B300"], size=2**p) for p in (power, power + 1))
    fits = [best_fit(run, cluster, USUAL, {}) for cluster in (small, large)]
    costs = [run_cost(run, f.layout, c, f.memory, USUAL) for f, c in zip(fits, (small, large), strict=True)]
    assert costs[1].step_seconds <= costs[0].step_seconds
    assert costs[1].roofline.arithmetic < costs[0].roofline.arithmetic or fits[0].layout.remat != fits[1].layout.remat


@given(st.sampled_from(sorted(RECIPES)), st.sampled_from(["none", "block"]))
def test_one_process_sends_nothing(name: str, remat: str):
    run = recipe(name)
    layout = Layout(microbatch_rows=run.train.microbatch_rows, remat=remat)
    assert transfers(run, layout) == []
    assert roofline(run, layout, Cluster(device=DEVICES["CPU"], size=1), USUAL).exchanges == 0


def test_the_search_finds_the_least_of_what_fits():
    """Every layout of a small cluster, walked without the search's shortcuts."""
    run = override(recipe("nano"), [f"train.batch_tokens={16 * 4096}"])
    cluster = Cluster(device=DEVICES["H200"], size=8)
    room = cluster.device.memory * USUAL.usable_memory
    seconds = {}
    for fsdp in (1, 2, 4, 8):
        for expert in (e for e in (1, 2, 4, 8) if fsdp % e == 0):
            for remat in ("none", "block"):
                for rows in (1, 2):
                    layout = Layout(8 // fsdp, fsdp, 1, expert, rows, remat, "bfloat16")
                    if fit_of(run, layout, cluster.device).memory.peak <= room:
                        seconds[layout] = roofline(run, layout, cluster, USUAL).seconds
    found = best_fit(run, cluster, USUAL, {}).layout
    assert seconds[found] == min(seconds.values())


def test_what_is_set_is_not_searched():
    run, cluster = recipe("large"), parse_cluster("2048xB300")
    fixed = {"expert": 8, "shard": 128, "remat": "block", "microbatch_rows": 2}
    layout = best_fit(run, cluster, USUAL, fixed).layout
    assert {name: getattr(layout, name) for name in fixed} == fixed


def test_ranks_of_a_group_in_one_server():
    layout = Layout(replicate=16, shard=128, context=1, expert=4)
    expected = {"expert": 4, "expert_shard": 2, "fsdp": 8, "replicate": 1, "world": 8}
    assert {group: members_in_server(group, layout, 8) for group in expected} == expected


def test_a_run_too_small_for_its_experts_is_told():
    run = recipe("lab256")
    layout = Layout(microbatch_rows=8)
    assert not expert_load(run, layout, DEVICES["CPU"]).warnings
    small = override(run, ["train.batch_tokens=4096", "optim.warmup_tokens=0"])
    told = expert_load(small, layout, DEVICES["CPU"])
    assert told.rows_a_step == 64 and len(told.warnings) == 2
    assert "64 rows a step" in told.warnings[0] and "192 directions" in told.warnings[0]
    thin = expert_load(run, layout._replace(microbatch_rows=1), DEVICES["CPU"])
    assert len(thin.warnings) == 1 and "8 rows a microbatch" in thin.warnings[0]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan_without_a_cluster(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"]["days"] > 0 and found["memory"]["with_checkpoint_copy"] <= found["memory"]["usable"]
    assert found["memory"]["peak"] == max(found["memory"]["moments_of_a_step"].values())
    assert found["cluster"]["name"] == {"large": "2048xB300"}.get(name, found["cluster"]["name"])
    small = name in ("debug", "demo", "lab256")
    assert (found["cluster"]["kind"] == "CPU") == small


def test_the_answer_comes_first(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "large", "--cluster", "2048xb300", "--tokens", "17T", "--price", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "large on 2048xB300, 17.1T tokens"
    assert "days" in lines[2] and "$6.5" in lines[2]
    assert "fits" in lines[3] and "layout" in lines[4]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["large", "--cluster", "8xH1000"], "Known: B300, B200, H200, H100, A100, RTX4090, CPU."),
        (["large", "--cluster", "B300"], "is not a cluster"),
        (["large", "--cluster", "0xB300"], "Write a number from 1"),
        (["large", "--cluster", "8xH100"], "The smallest cluster that holds all of large is 128xH100"),
        (["nano", "--cluster", "2xH100"], "nano, extension does not fit 2xH100"),
        (["nano", "--cluster", "2xH100"], "`--set extension.tokens=0` plans the run without its extension."),
        (["large", "--cluster", "1000xB300"], "divides 1,000 devices, 12,288 rows a step, 256 experts"),
        (["large", "--cluster", "1000xB300"], "Take 512 or 1,024 devices"),
        (["large", "--cluster", "64xB300", "--set", "parallel.expert=3"], "with expert 3"),
        (["large", "--compare", "lab256,all,foo"], "There is no 'foo' to compare with"),
        (["large", "--plot", "plan.jpg"], "Give it a name that ends in .png."),
        (["large", "--efficiency", "2"], "device.efficiency is 2.0"),
        (["large", "--price", "cheap"], "'price' must be float"),
        (["large", "--assume", "priice=3"], "Did you mean 'price'?"),
        (["large", "--assume", "usable_memory=0"], "assume.usable_memory is 0"),
        (["large", "--tokens", "many"], "is not a count"),
        (["large", "--set", "train.tokens=1T"], "which the run of 1,000,000,000,000 never reaches"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1, error


def test_a_shorter_run_costs_in_proportion(capsys: pytest.CaptureFixture[str]):
    """--tokens shortens warm-up and decay with the run; they cost what other tokens cost."""
    days = []
    for tokens in ("17T", "1.7T"):
        assert main(["plan", "large", "--cluster", "2048xB300", "--tokens", tokens, "--json"]) == 0
        days.append(json.loads(capsys.readouterr().out)["answer"]["days"])
    assert days[0] == pytest.approx(10 * days[1], rel=1e-3)


def test_a_ramp_and_an_extension_are_stages_of_their_own():
    """The published course: a smaller batch at first, other mixes, and an extension, which needs context ranks."""
    early = PhaseConfig(name="early", from_tokens=0)
    usual = PhaseConfig(name="usual", from_tokens=4_900_000_000_000, batch_tokens=16384 * 8192)
    mixed = PhaseConfig(name="mixed", from_tokens=10**13, mix="other")
    extension = ExtensionConfig(tokens=117 * 10**9, sequence_length=262144, batch_tokens=512 * 262144)
    run = replace(recipe("large"), phases=(early, usual, mixed), extension=extension)
    found = stages(run)
    assert [stage.name for stage in found] == ["early", "usual, mixed", "extension"]
    assert sum(stage.run.horizon for stage in found) == run.horizon
    assert sum(stage.run.steps for stage in found) == run.steps
    plan = figures(run, ("B300", 2048), DEVICES, USUAL, {})
    assert plan["answer"]["days"] == pytest.approx(sum(stage["days"] for stage in plan["stages"]))
    assert plan["answer"]["days"] > cost_of("large", "2048xB300").days
    assert plan["stages"][2]["layout"]["context"] > plan["stages"][1]["layout"]["context"] == 1


@pytest.mark.parametrize("kind", ["B300", "B200", "H200", "H100", "A100", "RTX4090"])
@pytest.mark.parametrize("name", ["lab256", "nano", "mini", "large"])
def test_the_smallest_cluster_that_is_named_holds_every_stage(name: str, kind: str):
    """And half of it does not: of the run as it is planned, its ramp and its extension included."""
    run = recipe(name)
    size = smallest_cluster(run, DEVICES[kind], USUAL, {})
    if size is None:
        assert (name, kind) == ("large", "RTX4090")
        return
    plan = figures(run, (kind, size), DEVICES, USUAL, {})
    assert [stage["name"] for stage in plan["stages"]] == [stage.name for stage in stages(run)]
    if size > 1:
        with pytest.raises(UsageError, match=f"holds all of {name} is {size}x{kind}"):
            figures(run, (kind, size // 2), DEVICES, USUAL, {})


@pytest.mark.parametrize("kind", ["H200", "H100"])
def test_the_published_run_takes_about_twice_as_long_on_hopper(kind: str):
    """The whole course as the command plans it, extension included."""
    days = [figures(recipe("large"), (name, 2048), DEVICES, USUAL, {})["answer"]["days"] for name in ("B300", kind)]
    assert 31 < days[0] < 35 and 2 < days[1] / days[0] < 2.6


def test_what_a_small_model_takes_on_a_gpu_is_bound_by_starting_kernels():
    plan = figures(recipe("demo"), ("B300", 1), DEVICES, USUAL, {})
    assert plan["roofline"]["seconds"] == plan["roofline"]["launches"] == plan["answer"]["step_seconds"]


def test_the_beginning_of_a_ramp_is_warned_of():
    run = override(recipe("lab256"), ["train.batch_tokens=4096", "optim.warmup_tokens=0"])
    early = PhaseConfig(name="early", from_tokens=0)
    usual = PhaseConfig(name="usual", from_tokens=4096 * 1000, batch_tokens=131072)
    plan = figures(replace(run, phases=(early, usual)), ("CPU", 1), DEVICES, USUAL, {})
    assert plan["experts"]["warnings"][0].startswith("early: Each expert sees 64 rows a step")


def test_fixed_shards_leave_room_for_context_ranks():
    """The published layout: 128 shards of weights, of which a stage with long rows shares each row between several."""
    plan = figures(recipe("large"), ("B300", 2048), DEVICES, USUAL, {"replicate": 16, "shard": 128, "expert": 8})
    layouts = [stage["layout"] for stage in plan["stages"]]
    assert {layout["replicate"] * layout["shard"] * layout["context"] for layout in layouts} == {2048}
    assert {layout["shard"] * layout["context"] for layout in layouts} == {128} and layouts[-1]["context"] > 1


def test_nothing_fits_says_so():
    with pytest.raises(UsageError, match="No number of RTX4090 holds large"):
        best_fit(recipe("large"), parse_cluster("16xRTX4090"), USUAL, {})


GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "planning.md"


def test_the_guide_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]):
    shown = GUIDE.read_text().split("```\n")[2]
    assert main(["plan", "large", "--cluster", "2048xB300", "--tokens", "17T"]) == 0
    assert capsys.readouterr().out.startswith(shown) and shown.count("\n") > 9


def test_the_commands_of_the_guide_and_of_the_help_work(capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "chat").mkdir(parents=True)
    shape = {"config": to_dict(recipe("demo"))}
    (tmp_path / "models" / "chat" / "config.json").write_text(json.dumps(shape))
    told = f"{GUIDE.read_text()}\n{plan_command.__doc__}"
    lines = {line.strip().removeprefix("$ ") for line in told.splitlines()}
    commands = sorted(line for line in lines if line.startswith("trinity plan") and "--dry-run" not in line)
    assert len(commands) >= 6
    for command in commands:
        assert main(command.split()[1:]) == 0, command
        assert capsys.readouterr().out
