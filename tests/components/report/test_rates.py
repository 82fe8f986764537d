"""The picture of a sweep, read back from its SVG."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from components.records.sweep import RateLoss, SweepResult, Tuned, TunedRate
from components.report import charts
from components.report.page import build_report
from components.report.run_files import RunFiles

SVG = "{http://www.w3.org/2000/svg}"


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
    each = [
        tuned("lora", 1e-3, {1e-4: 3.0, 1e-3: 2.0, 1e-2: 4.0, 1e-1: None}),
        tuned("<dora>", 1e-3, {1e-4: 3.5, 1e-3: 2.5, 1e-2: 3.0}),
    ]
    return SweepResult(
        run_id="r1", adapter="a", base={}, dataset={}, config_sha256="", environment={}, records=64, start_loss=5.0,
        best=each[0], tuned=each, verdict="Keep lora & go on.", advised_method="lora", trials=[],
    )  # fmt: skip


def test_marks_lie_where_rates_and_losses_say_on_a_logarithmic_axis(result: SweepResult) -> None:
    root = ET.fromstring(charts.rates_picture(result))
    lora, dora = root.findall(f"{SVG}g")
    circles = [[float(c.get(axis, "nan")) for axis in ("cx", "cy")] for c in lora.findall(f"{SVG}circle")]
    xs, ys = zip(*circles, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)  # a decade is a decade
    assert (ys[0] - ys[1]) / (ys[0] - ys[2]) == pytest.approx((3 - 2) / (3 - 4), abs=0.01)  # and downwards is lower
    assert [c.get("r") for c in lora.findall(f"{SVG}circle")] == ["3.5", "6", "3.5"]
    (crossed,) = [p for p in lora.findall(f"{SVG}path") if p.find(f"{SVG}title") is not None]
    assert crossed.find(f"{SVG}title").text == "lora, rank 16 at 0.1: diverged"
    assert len(dora.findall(f"{SVG}circle")) == 3


def test_the_page_shows_the_picture_and_escapes_what_the_sweep_names(result: SweepResult, tmp_path: Path) -> None:
    page = build_report(RunFiles("r1", "a", sweep=result))
    assert "Keep lora &amp; go on." in page
    assert "&lt;dora&gt;, rank 16" in page
    assert "<dora>" not in page
    rate = TunedRate(learning_rate=3e-3, prior=1e-3, sweep_run_id="r0", advice="batches of 16 to 128")
    html = build_report(RunFiles("r1", "a", rate=rate))
    assert "This run trained at 0.003, which the sweep of run r0 found; the config's own rate is 0.001." in html
    assert "Worth a sweep: batches of 16 to 128." in html
    assert 'id="rate"' not in build_report(RunFiles("r1", "a"))
