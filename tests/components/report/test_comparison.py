"""How the compared models are drawn, and the tables of what was asked outside the domain."""

import math
from dataclasses import replace

import pytest

from components.config.gate import Limit
from components.records.steps import HarnessScores, PairedDifference, RuleResult, SliceResult, TaskScore
from components.report.charts import Forest, Gain
from components.report.comparison import Panel, harness, intervals, panels, rules, since_champion, slices
from components.report.report import build_report, gain_text
from components.report.run_files import RunFiles
from components.shared.metrics import metric_of
from components.shared.paired import Bounds
from tests.components.report import example_runs
from tests.components.report.example_runs import decided, promoted_run, with_decision, with_evaluation


def panel(run: RunFiles, key: str = "loss") -> Panel:
    return next(panel for panel in panels(run) if panel.metric.key == key)


def places(picture: Forest) -> tuple[float, float, float, float]:
    """Where the lower bound, the gain, the upper bound and zero of the first gain lie."""
    gain = picture.gains[0]
    low, high = picture.ends(gain)
    return low, picture.axis.place(gain.gain), high, picture.axis.place(0.0)


def test_bars_are_in_proportion_and_start_at_zero() -> None:
    base, champion, candidate = panel(promoted_run()).bars
    assert [bar.kind for bar in (base, champion, candidate)] == ["base", "champion", "candidate"]
    assert base.start == candidate.start == 0
    assert candidate.width / base.width == pytest.approx(0.912 / 2.306, abs=1e-4)
    assert champion.text == "0.951"


def test_the_gates_bounds_are_drawn_where_they_bind() -> None:
    to_beat_base, to_keep_up = panel(example_runs.held_run()).marks
    assert to_beat_base.position == pytest.approx((2.306 - 0.05) / 2.306 * 100, abs=0.01)
    assert to_keep_up.position == pytest.approx((0.951 + 0.02) / 2.306 * 100, abs=0.01)
    assert (to_beat_base.passed, to_keep_up.passed) == (True, False)
    assert to_keep_up.text == "at most 0.971, not to fall behind production"


@pytest.mark.parametrize(
    ("key", "text", "position", "rule"),
    [
        ("general_loss", "Loss on general text: Base model 3.400; Candidate 4.550", 3.9 / 4.55 * 100, "remembers"),
        ("kl_from_base", "KL divergence from the base: Base model 0.000; Candidate 0.900", 500 / 9, "near_base"),
    ],
)
def test_what_changed_outside_the_domain_is_drawn_with_its_line(key: str, text: str, position, rule: str) -> None:
    run = example_runs.forgetful_run()
    shown = panel(run, key)
    assert shown.text == text
    (mark,) = shown.marks
    assert mark.passed is False
    assert mark.position == pytest.approx(position, abs=0.01)
    title = next(each.title for each in run.rules if each.name == rule)
    (drawn,) = (each for each in intervals(run) if each.gains[0].name == title)
    assert drawn.bound is not None
    assert places(drawn)[1] < drawn.axis.place(drawn.bound) < places(drawn)[3]
    assert rule in [result.name for result, _, _ in rules(run)]


def test_bounds_of_a_metric_where_higher_is_better_lie_on_the_other_side() -> None:
    run = decided(promoted_run(), metric="exact_match", better_than_base_by=0.1, limits=[])
    assert [mark.text for mark in panel(run, "exact_match").marks] == [
        "at least 12.3 %, to beat the base",
        "at least 66.3 %, not to fall behind production",
        "at least 63.3 %, not to fall behind the best so far",
    ]


def test_a_negative_value_grows_to_the_left_of_zero() -> None:
    candidate = example_runs.metrics(1.0, 0.5, 0.5, -0.5)
    run = replace(example_runs.held_run(), evaluation=example_runs.evaluation("r", candidate, None), decision=None)
    (bar,) = panel(run, "prompt_gain").bars
    assert (bar.start, bar.width) == (0.0, 100.0)


def test_perplexity_is_drawn_only_when_the_gate_looks_at_it() -> None:
    assert "perplexity" not in [panel.metric.key for panel in panels(promoted_run())]
    run = decided(promoted_run(), limits=[Limit(metric="perplexity", max=5.0)])
    assert "perplexity" in [panel.metric.key for panel in panels(run)]


def test_the_gain_on_each_slice_is_drawn_on_one_axis_the_worst_first() -> None:
    run = example_runs.held_run()
    parts = [
        SliceResult(kind="label", name=name, records=60, gain=gain, lower=gain - 0.1, upper=gain + 0.1, worse=gain < 0)
        for name, gain in (("Eye", -0.3), ("Skin", 0.1))
    ]
    about = {"field": "gate.slices", "metric": "loss", "bound": 0.05, "text": "it"}
    rule = RuleResult(name="slices", slices=tuple(parts), passed=False, **about)
    assert slices(run) is None
    shown = slices(with_decision(run, rules=(rule,)))
    eye, skin = shown.gains
    assert (eye.name, eye.bad, eye.about) == ("label: Eye", True, "60 records")
    assert (skin.name, skin.bad) == ("label: Skin", False)
    minus = "\N{MINUS SIGN}"
    assert eye.text == f"{minus}0.300 (between {minus}0.400 and {minus}0.200)"
    place = shown.axis.place
    assert shown.bound == -0.05
    assert 0 < place(-0.4) < place(-0.2) < place(-0.05) < place(0) < place(0.2) < 100


def test_what_is_new_is_drawn_beside_what_the_champion_knew_one_picture_a_metric() -> None:
    def part(records: int, gain: float) -> list[PairedDifference]:
        paired = PairedDifference(metric="loss", difference=gain, ci95=(gain - 0.1, gain + 0.1), records=records)
        return [paired, paired.model_copy(update={"metric": "exact_match", "ci95": None})]

    run = example_runs.held_run()
    assert since_champion(run) == []
    run = with_evaluation(run, since_champion={"new": part(37, 0.5), "seen": part(463, -0.02)})
    (shown,) = since_champion(run)
    found = [(each.name, each.about) for each in shown.gains]
    assert found == [("new since production", "37 records"), ("known to production", "463 records")]
    assert shown.gains[0].text == "+0.500 (between +0.400 and +0.600)"
    assert "What is new, and what production knew" in build_report(run)


def test_every_comparison_of_the_gate_is_drawn_between_its_bounds_and_against_its_line() -> None:
    run = promoted_run()
    assert run.decision is not None
    shown = intervals(replace(run, decision=example_runs.bounded(run.decision)))
    assert [each.gains[0].name for each in shown] == [
        "Loss better than the base model's",
        "Loss not worse than production's",
        "Loss not worse than the best version's",
        "Exact match not below production's",
    ]
    for each in shown:
        low, gain, high, _ = places(each)
        assert 0 <= low < gain < high <= 100
    assert shown[1].gains[0].text == "Loss: 0.039 better, between +0.018 and +0.060"
    assert [each.note for each in shown[1:]] == ["required: −0.020 or more", "required: −0.050 or more", ""]  # noqa: RUF001
    assert shown[1].bound == pytest.approx(-0.02)


def test_without_a_gate_the_intervals_are_those_of_the_evaluation() -> None:
    against_base, against_champion = intervals(example_runs.undecided_run())
    for each in (against_base, against_champion):
        low, gain, high, _ = places(each)
        assert 0 <= low < gain < high <= 100
    assert against_champion.bound is None
    assert "0.039 better, 95 % interval +0.018 to +0.060, 300 records" in against_champion.gains[0].text


def test_a_gain_without_a_bound_is_drawn_over_the_whole_axis() -> None:
    picture = Forest([Gain("Eye", "", 0.1, 0.05, 0.15, ""), Gain("Skin", "", 0.02, None, None, "")], -0.05)
    eye, skin = map(picture.ends, picture.gains)
    assert 0 < eye[0] < eye[1] < 100
    assert skin == (0, 100)


def test_a_difference_that_is_bounded_on_one_side_alone_is_said_so() -> None:
    """An infinite bound is one in memory, and null in a record."""
    loss = metric_of("loss")
    assert loss.range_text(-0.1, 0.2) == "between \N{MINUS SIGN}0.100 and +0.200"
    assert loss.range_text(-math.inf, 0.2) == loss.range_text(None, 0.2) == "below +0.200"
    assert loss.range_text(-0.1, math.inf) == "above \N{MINUS SIGN}0.100"
    assert loss.range_text(None, math.inf) == loss.range_text(None, math.inf, confidence=0.95) == "anywhere"
    both, one = Bounds(0.1, -0.1, 0.2, 0.1, 30, 30), Bounds(0.1, -math.inf, 0.2, 0.1, 30, 30)
    assert gain_text("loss", both, 0.95).endswith(" and +0.200, each with 95 % confidence")
    assert gain_text("loss", one, 0.95).endswith("below +0.200, with 95 % confidence")


SCORES = {
    "base": (TaskScore(task="arc_<easy>", metric="acc", value=0.61234, stderr=0.0487),),
    "candidate": (
        TaskScore(task="arc_<easy>", metric="acc", value=0.5, stderr=None),
        TaskScore(task="wikitext", metric="word_perplexity", value=None),
    ),
}


def test_each_model_has_its_value_of_a_task_with_its_standard_error() -> None:
    found = HarnessScores(lm_eval="0.4.13", tasks=("arc_<easy>", "wikitext"), limit=50, scores=SCORES)
    dash = "\N{EN DASH}"
    assert [(row.title, row.more["Metric"], row.values) for row in harness(found)] == [
        ("arc_<easy>", "acc", {"base": "0.6123 ± 0.049", "champion": dash, "candidate": "0.5"}),
        ("wikitext", "word_perplexity", {"base": dash, "champion": dash, "candidate": dash}),
    ]
    page = build_report(with_evaluation(promoted_run(), harness=found))
    for words in ("arc_&lt;easy&gt;", "0.6123 ± 0.049", "each task's first 50", "lm-eval 0.4.13"):
        assert words in page
    found = HarnessScores(lm_eval="0.4.13", tasks=("wikitext",), left_out="as it is so")
    left_out = build_report(with_evaluation(promoted_run(), harness=found))
    assert "Left out, as it is so." in left_out
    assert "Table of tasks" not in left_out
    assert "lm-evaluation-harness" not in build_report(promoted_run())
