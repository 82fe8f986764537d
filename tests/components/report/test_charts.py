import math
import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import pytest

from components.records.sweep import RateLoss, SweepResult, Tuned, TunedRate
from components.report import charts
from components.report.charts import MAX_POINTS, loss_axis, loss_picture, nice_ticks, smoothed, thinned
from components.report.report import build_report
from components.report.run_files import RunFiles
from tests.components.report.example_runs import training

SVG = "{http://www.w3.org/2000/svg}"


def train(step: int, loss: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "learning_rate": 1e-3}


def held_out(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "loss": loss}


def drawn(records: list[dict[str, Any]]) -> tuple[ET.Element, str]:
    """The drawing of one run's losses, and its words."""
    picture = loss_picture({"r": records})
    root = ET.fromstring(picture[0])
    group = root.find(f"{SVG}g")
    assert group is not None
    return group, picture[1]


def circles(group: ET.Element) -> list[tuple[float, float, str]]:
    return [(float(c.get("cx", "")), float(c.get("cy", "")), c.get("r", "")) for c in group.findall(f"{SVG}circle")]


def test_no_finite_loss_gives_no_picture() -> None:
    assert loss_picture({"r": []}) is None
    assert loss_picture({"r": [train(1, None), train(2, math.nan), train(3, "1.0")]}) is None


def test_a_resumed_run_counts_the_later_record_of_a_step() -> None:
    group, text = drawn([train(1, 9.0), train(2, 9.0), train(2, 1.0), train(3, 1.0)])
    points = group.findall(f"{SVG}path")[0].get("d", "")
    assert points.count("M") == 3
    assert text.endswith("to 2.080 in 3 steps")  # the mean of the logarithms of 9, 1 and 1


def test_the_best_held_out_loss_is_marked_and_told_and_all_lie_inside_the_picture() -> None:
    group, text = drawn([train(1, 2.0), train(30, 1.0), held_out(10, 1.5), held_out(20, 1.2), held_out(30, 1.3)])
    assert [radius for _, _, radius in circles(group)] == ["3.5", "6", "3.5"]
    assert "best held-out loss 1.200 at step 20" in text
    for x, y, _ in circles(drawn(training())[0]):
        assert charts.LEFT <= x <= charts.RIGHT
        assert charts.TOP <= y <= charts.BOTTOM


def test_of_several_runs_the_smoothed_lines_alone_are_drawn() -> None:
    picture = loss_picture({"one": training(), "two": [held_out(10, 1.0)], "none": []})
    one, two, none = ET.fromstring(picture[0]).findall(f"{SVG}g")
    assert [len(each.findall(f"{SVG}path")) for each in (one, two, none)] == [1, 1, 1]
    assert [len(each.findall(f"{SVG}circle")) for each in (one, two, none)] == [4, 1, 0]
    assert picture[1].endswith("two: best held-out loss 1.000 at step 10; none: no loss")


def test_an_outlier_does_not_flatten_the_curve() -> None:
    group, _ = drawn([train(step, 1.0 + step % 3) for step in range(1, 200)] + [train(200, 1000.0)])
    assert group.findall(f"{SVG}path")[0].get("d", "").count("M") == 199


def test_losses_that_differ_much_have_a_logarithmic_axis_and_others_a_linear_one() -> None:
    steep = loss_axis([], [8.0, 4.0, 2.0, 1.0])
    assert steep.is_log
    assert steep.ticks == (1.0, 2.0, 3.0, 5.0)
    assert loss_axis([], [120.0, 0.9]).ticks == (1.0, 3.0, 10.0, 30.0, 100.0)
    steps = [after - before for before, after in pairwise(map(steep.place, (1.0, 2.0, 4.0, 8.0)))]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.02)
    flat = loss_axis([], [2.0, 1.5, 1.0])
    assert not flat.is_log
    assert flat.place(1.5) - flat.place(1.0) == pytest.approx(flat.place(2.0) - flat.place(1.5), abs=0.02)
    assert not loss_axis([], [8.0, 0.0]).is_log  # which no logarithm has


def test_smoothing_begins_at_the_first_point_and_is_of_logarithms_where_there_are_some() -> None:
    falling = [(float(step), 100.0 - step) for step in range(100)]
    smooth = smoothed(falling)
    assert smooth[0] == pytest.approx(falling[0])
    assert smooth[50] == (50, pytest.approx(50.0, rel=5e-3))
    assert smoothed([(0, -1.0), (1, 1.0)])[0] == (0, -1.0)


def test_thinning_keeps_both_ends() -> None:
    series = [(float(step), 0.0) for step in range(10_000)]
    kept = thinned(series)
    assert (len(kept), kept[0], kept[-1]) == (MAX_POINTS, series[0], series[-1])
    assert thinned(series[:5]) == series[:5]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.91, 2.43, [1.0, 1.5, 2.0]), (1, 125, [50, 100]), (5, 5, [5])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high, 5) == expected


def tuned(method: str, best: float, losses: dict[float, float | None]) -> Tuned:
    found = [
        RateLoss(
            learning_rate=rate, loss=loss, statuses=["diverged" if loss is None else "finished"],
            ci95=None if loss is None else (loss - 0.1, loss + 0.1),
        )
        for rate, loss in losses.items()
    ]  # fmt: skip
    return Tuned(
        method=method, rank=16, batch_size=16, prior=1e-3, learning_rate=best, loss=losses[best] or 0.0,
        is_inside=True, rates=found,
    )  # fmt: skip


@pytest.fixture
def result() -> SweepResult:
    lora, dora = {1e-4: 3.0, 1e-3: 2.0, 1e-2: 4.0, 1e-1: None}, {1e-4: 3.5, 1e-3: 2.5, 1e-2: 3.0}
    each = [tuned("lora", 1e-3, lora), tuned("<dora>", 1e-3, dora)]
    return SweepResult(
        run_id="r1", adapter="a", base={}, dataset={}, config_sha256="", environment={}, records=64, start_loss=5.0,
        best=each[0], tuned=each, verdict="Keep lora & go on.", advised_method="lora", trials=[],
    )  # fmt: skip


def test_marks_lie_where_rates_and_losses_say_on_a_logarithmic_axis(result: SweepResult) -> None:
    lora, dora = ET.fromstring(charts.rates_picture(result)).findall(f"{SVG}g")
    xs, ys, radii = zip(*circles(lora), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)  # a decade is a decade
    assert (ys[0] - ys[1]) / (ys[0] - ys[2]) == pytest.approx((3 - 2) / (3 - 4), abs=0.01)  # and downwards is lower
    assert radii == ("3.5", "6", "3.5")
    titles = [path.findtext(f"{SVG}title") for path in lora.findall(f"{SVG}path")]
    assert [title for title in titles if title] == ["lora, rank 16 at 0.1: diverged"]
    assert len(circles(dora)) == 3


def test_the_page_shows_the_picture_and_escapes_what_the_sweep_names(result: SweepResult) -> None:
    page = build_report(RunFiles("r1", "a", sweep=result))
    assert "Keep lora &amp; go on." in page
    assert "&lt;dora&gt;, rank 16" in page
    assert "<dora>" not in page
    rate = TunedRate(learning_rate=3e-3, prior=1e-3, sweep_run_id="r0")
    html = build_report(RunFiles("r1", "a", rate=rate))
    assert "This run trained at 0.003, which the sweep of run r0 found; the config's own rate is 0.001." in html
    assert 'id="rate"' not in build_report(RunFiles("r1", "a"))
