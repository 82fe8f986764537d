import math
from dataclasses import replace

import pytest

from components.config.gate import GateConfig, Limit
from components.records.steps import RuleResult, SliceResult
from components.report import charts
from components.report.comparison import intervals, panels, rules, slices
from components.report.report import gain_text
from components.report.run_files import RunFiles
from components.shared.metrics import METRICS, metric_of
from components.shared.paired import Bounds
from tests.components.report import example_runs


def loss_panel(run: RunFiles):  # type: ignore[no-untyped-def]
    return next(panel for panel in panels(run) if panel.metric.key == "loss")


def test_bars_are_in_proportion_and_start_at_zero() -> None:
    base, champion, candidate = loss_panel(example_runs.promoted_run()).bars
    assert [bar.kind for bar in (base, champion, candidate)] == ["base", "champion", "candidate"]
    assert base.start == candidate.start == 0
    assert candidate.width / base.width == pytest.approx(0.912 / 2.306, abs=1e-4)
    assert champion.text == "0.951"


def test_the_gates_bounds_are_drawn_where_they_bind() -> None:
    to_beat_base, to_keep_up = loss_panel(example_runs.held_run()).marks
    assert to_beat_base.position == pytest.approx((2.306 - 0.05) / 2.306 * 100, abs=0.01)
    assert to_keep_up.position == pytest.approx((0.951 + 0.02) / 2.306 * 100, abs=0.01)
    assert (to_beat_base.passed, to_keep_up.passed) == (True, False)
    assert to_keep_up.text == "at most 0.971, not to fall behind production"


def test_what_was_forgotten_is_drawn_against_the_base_and_its_margin() -> None:
    run = example_runs.forgetful_run()
    panel = next(panel for panel in panels(run) if panel.metric.key == "general_loss")
    assert panel.text == "Loss on general text: Base model 3.400; Candidate 4.550"
    (mark,) = panel.marks
    assert (mark.text, mark.passed) == ("at most 3.900, not to forget what the base knows", False)
    assert mark.position == pytest.approx(3.9 / 4.55 * 100, abs=0.01)
    drawn = next(interval for interval in intervals(run) if interval.name == "Remembers what the base knows")
    assert drawn.text.startswith("Loss on general text: 1.150 worse, between")
    assert drawn.bound is not None
    assert drawn.position < drawn.bound < drawn.zero


def test_how_far_an_adapter_has_moved_from_its_base_is_drawn_with_its_line() -> None:
    run = example_runs.forgetful_run()
    panel = next(panel for panel in panels(run) if panel.metric.key == "kl_from_base")
    assert panel.text == "KL divergence from the base: Base model 0.000; Candidate 0.900"
    (mark,) = panel.marks
    assert (mark.text, mark.passed) == ("at most 0.500, to answer as the base does", False)
    drawn = next(each for each in intervals(run) if each.name == "Answers as its base outside the domain")
    assert drawn.bound is not None
    assert drawn.position < drawn.bound < drawn.zero
    (row,) = (row for row in rules(run) if row.rule.name == "near_base")
    assert (row.candidate, row.other, row.bound) == ("0.900", "0.000", "at most 0.5")


def test_bounds_of_a_metric_where_higher_is_better_lie_on_the_other_side() -> None:
    run = example_runs.promoted_run()
    assert run.evaluation is not None
    policy = GateConfig(metric="exact_match", better_than_base_by=0.1, worse_than_champion_by=0.02, limits=[])
    run = replace(run, decision=example_runs.decision(run.evaluation, policy))
    marks = next(panel for panel in panels(run) if panel.metric.key == "exact_match").marks
    assert [mark.text for mark in marks] == [
        "at least 12.3 %, to beat the base",
        "at least 66.3 %, not to fall behind production",
        "at least 63.3 %, not to fall behind the best so far",
    ]


def test_a_negative_value_grows_to_the_left_of_zero() -> None:
    candidate = example_runs.metrics(1.0, 0.5, 0.5, -0.5)
    run = replace(example_runs.held_run(), evaluation=example_runs.evaluation("r", candidate, None), decision=None)
    (bar,) = next(panel for panel in panels(run) if panel.metric.key == "prompt_gain").bars
    assert (bar.start, bar.width) == (0.0, 100.0)


def test_perplexity_is_drawn_only_when_the_gate_looks_at_it() -> None:
    run = example_runs.promoted_run()
    assert run.evaluation is not None
    assert "perplexity" not in [panel.metric.key for panel in panels(run)]
    policy = GateConfig(limits=[Limit(metric="perplexity", max=5.0)])
    run = replace(run, decision=example_runs.decision(run.evaluation, policy))
    assert "perplexity" in [panel.metric.key for panel in panels(run)]


def test_the_gain_on_each_slice_is_drawn_on_one_axis_the_worst_first() -> None:
    run = example_runs.held_run()
    assert run.decision is not None
    parts = [
        SliceResult(kind="label", name=name, records=60, gain=gain, lower=gain - 0.1, upper=gain + 0.1, worse=gain < 0)
        for name, gain in (("Eye", -0.3), ("Skin", 0.1))
    ]
    rule = RuleResult(
        name="slices", field="gate.slices", metric="loss", bound=0.05, slices=tuple(parts), passed=False, text="it"
    )
    assert slices(run) is None
    shown = slices(replace(run, decision=run.decision.model_copy(update={"rules": (rule,)})))
    assert shown is not None
    assert [(row.name, row.bad, row.about) for row in shown.rows] == [
        ("label: Eye", True, "60 records"),
        ("label: Skin", False, "60 records"),
    ]
    eye, skin = shown.rows
    per_nat = (skin.position - eye.position) / 0.4
    assert eye.high - eye.low == pytest.approx(0.2 * per_nat, rel=1e-3)
    assert (eye.zero - (eye.bound or 0)) / per_nat == pytest.approx(0.05, rel=1e-3)
    assert eye.bound is not None
    assert 0 < eye.low < eye.high < eye.bound < eye.zero < skin.high < 100
    assert eye.text == "\N{MINUS SIGN}0.300 (\N{MINUS SIGN}0.400 to \N{MINUS SIGN}0.200)"


def test_every_comparison_of_the_gate_is_drawn_between_its_bounds_and_against_its_line() -> None:
    run = example_runs.promoted_run()
    assert run.decision is not None
    rules = [
        rule if rule.gain is None else rule.model_copy(update={"lower": rule.gain - 0.021, "upper": rule.gain + 0.03})
        for rule in run.decision.rules
    ]
    shown = intervals(replace(run, decision=run.decision.model_copy(update={"rules": tuple(rules)})))
    assert [each.name for each in shown] == [
        "Loss better than the base model's",
        "Loss not worse than production's",
        "Loss not worse than the best version's",
        "Exact match not below production's",
    ]
    for each in shown:
        assert 0 <= each.low < each.position < each.high <= 100
    assert shown[1].text == "Loss: 0.039 better, between +0.018 and +0.069"
    assert [each.bound_text for each in shown[1:]] == ["required: −0.020 or more", "required: −0.050 or more", ""]  # noqa: RUF001
    assert shown[1].bound is not None
    assert shown[1].bound < shown[1].zero < shown[1].low


def test_without_a_gate_the_intervals_are_those_of_the_evaluation() -> None:
    against_base, against_champion = intervals(example_runs.undecided_run())
    for each in (against_base, against_champion):
        assert 0 <= each.low < each.position < each.high <= 100
    assert against_champion.bound is None
    assert "0.039 better, 95 % interval +0.018 to +0.060, 300 records" in against_champion.text


@pytest.mark.parametrize(
    ("key", "ours", "theirs", "words"),
    [
        ("loss", 0.9, 1.0, "0.100 better"),
        ("loss", 1.0, 0.9, "0.100 worse"),
        ("exact_match", 0.72, 0.68, "4.0 points better"),
        ("exact_match", 0.68, 0.72, "4.0 points worse"),
        ("token_f1", 0.5, 0.5, "no difference"),
    ],
)
def test_differences_are_told_as_better_or_worse(key: str, ours: float, theirs: float, words: str) -> None:
    metric = METRICS[key]
    assert metric.gain_text(metric.gain(ours, theirs)) == words


def test_a_gain_without_a_bound_is_drawn_over_the_whole_axis() -> None:
    gains = [
        charts.Gain(name, "", *bounds, charts.bounded_text(metric_of("loss"), *bounds))
        for name, bounds in (("label: Eye", (0.1, 0.05, 0.15)), ("label: Skin", (0.02, None, None)))
    ]
    eye, skin = charts.intervals_of(gains, -0.05)
    assert 0 < eye.low < eye.position < eye.high < 100
    assert (skin.low, skin.high) == (0, 100)
    assert skin.text == "+0.020 (anywhere)"


def test_a_difference_that_is_bounded_on_one_side_alone_is_said_so() -> None:
    """An infinite bound is one in memory, and null in a record."""
    loss = metric_of("loss")
    assert loss.range_text(-0.1, 0.2) == "between \N{MINUS SIGN}0.100 and +0.200"
    assert loss.range_text(-math.inf, 0.2) == loss.range_text(None, 0.2) == "below +0.200"
    assert loss.range_text(-0.1, math.inf) == "above \N{MINUS SIGN}0.100"
    assert loss.range_text(None, math.inf) == "anywhere"
    assert loss.range_text(None, math.inf, confidence=0.95) == "anywhere"
    assert gain_text("loss", Bounds(0.1, -0.1, 0.2, 0.1, 30, 30), 0.95).endswith(
        " and +0.200, each with 95 % confidence"
    )
    assert gain_text("loss", Bounds(0.1, -math.inf, 0.2, 0.1, 30, 30), 0.95).endswith(
        "below +0.200, with 95 % confidence"
    )
