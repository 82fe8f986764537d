"""Charts: dots between their bounds, lines over steps or rates, and bars, each placed on axes that hold what it shows.

The templates draw them as SVG, with the same in words beside it. Positions are in per cent of the picture, which scales
with the page while its text does not; a picture of lines has units of its own, because it is also a file by itself.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from components.records.steps import finite
from components.records.sweep import SweepResult
from components.report.html import count, number, template

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, which lie from `start` to `end` of the picture."""

    low: float
    high: float
    start: float = 0.0
    end: float = 100.0
    ticks: tuple[float, ...] = ()
    is_log: bool = False

    def place(self, value: float) -> float:
        scale = math.log if self.is_log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(self.start + share * (self.end - self.start), 2)

    def labels(self, text: Callable[[float], str]) -> list[tuple[float, str]]:
        return [(self.place(value), text(value)) for value in self.ticks]


def axis_of(values: Iterable[float], *, pad: float = 0.0, start: float = 0.0, end: float = 100.0) -> Axis:
    """An axis that holds every value, and on either side as much again as `pad` of their span."""
    values = [*values]
    low, high = min(values), max(values)
    margin = pad * (high - low)
    if low == high:
        margin, high = float(pad > 0), high + (pad == 0)
    return Axis(low - margin, high + margin, start, end)


def loss_axis(points: Sequence[float], lines: Sequence[float], start: float = 100.0, end: float = 0.0) -> Axis:
    """An axis with every value of the lines, and the points but for the highest fiftieth.

    It is logarithmic where a linear one would show the start of a training and nothing after it: from a ratio of the
    highest to the lowest of 4 on.
    """
    shown = [*lines, *sorted(points)[: math.ceil(len(points) * 0.98)]]
    low, high = min(shown), max(shown)
    if low > 0 and high / low >= 4:
        low, high = low * 0.97, high * 1.03
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        multiples = (1, 2, 3, 5) if high / low < 30 else (1, 3)
        round_ones = (float(f"{multiple * 10.0**power:.6g}") for power in powers for multiple in multiples)
        return Axis(low, high, start, end, tuple(tick for tick in round_ones if low <= tick <= high), is_log=True)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = max(low - margin, 0.0) if low >= 0 else low - margin, high + margin
    ticks = nice_ticks(low, high, 5)
    return Axis(min(low, ticks[0]), max(high, ticks[-1]), start, end, tuple(ticks))


def nice_ticks(low: float, high: float, num_wanted: int, *, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that lie between `low` and `high`."""
    rough = ((high - low) or abs(high) or 1.0) / num_wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= rough * 0.999)
    if whole:
        step = max(step, 1.0)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)] or [low]


@dataclass(frozen=True)
class Bar:
    """A value as a bar, or a part of a time line; `kind` gives its colour or its remark."""

    kind: str
    name: str
    start: float
    width: float
    text: str


def bar(axis: Axis, low: float, high: float, *, kind: str, name: str, text: str) -> Bar:
    """Place a bar from `low` to `high`; a very small one is still seen."""
    start = axis.place(low)
    return Bar(kind, name, start, max(axis.place(high) - start, 0.4), text)


@dataclass(frozen=True)
class Gain:
    """A gain and its bounds, with what is said about them. A bound that is None is not finite."""

    name: str
    about: str
    gain: float
    lower: float | None
    upper: float | None
    text: str
    bad: bool = False


class Forest:
    """A forest plot: gains between their bounds, one below the other, on one axis that holds zero and the bound that
    they should reach, if any."""

    def __init__(self, gains: Sequence[Gain], bound: float | None = None, note: str = "") -> None:
        self.gains, self.bound, self.note = gains, bound, note
        ends = [end for gain in gains for end in (gain.gain, gain.lower, gain.upper, bound) if end is not None]
        self.axis = axis_of([0.0, *ends], pad=0.05)

    def ends(self, gain: Gain) -> Point:
        """Where the gain's bounds lie; at the ends of the axis, where they are not finite."""
        axis = self.axis
        return (
            axis.start if gain.lower is None else axis.place(gain.lower),
            axis.end if gain.upper is None else axis.place(gain.upper),
        )


# Several lines in one picture: a self-contained SVG, part of a page, and a file beside a sweep's record.

SIZE = (720, 380)
LEFT, RIGHT, TOP, BOTTOM = 64.0, 570.0, 24.0, 332.0
# Distinguishable to most people with a colour vision deficiency (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#8c6d31")
MAX_POINTS = 400  # more would not be seen and would only make the page larger


class Dot(NamedTuple):
    """A measurement, and the ends of its interval if it has one."""

    x: float
    y: float
    text: str
    is_best: bool = False
    low: float | None = None
    high: float | None = None


class Line(NamedTuple):
    """One line of the picture, such as the rates of one method."""

    name: str
    path: str
    dots: Sequence[Dot]
    points: str = ""
    """Path of single measurements, behind the line."""
    diverged: Sequence[tuple[float, str]] = ()
    """Where on the axis, and as text: the rates that diverged."""


def loss_picture(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str, str] | None:
    """The SVG of the smoothed training losses of runs as lines and their held-out losses as circles, and the same in
    words; of a single run also the loss of each step. None if no run has any.

    `runs` are the records of each run's metrics.jsonl, by its name.
    """
    trained = {name: series(records, "train", "loss") for name, records in runs.items()}
    held_out = {name: series(records, "eval", "loss") for name, records in runs.items()}
    smooth = {name: smoothed(points) for name, points in trained.items()}
    shown = [point for points in (*smooth.values(), *held_out.values()) for point in points]
    if not shown:
        return None
    each_step = next(iter(trained.values())) if len(runs) == 1 else []
    last = max(step for step, _ in shown)
    x = Axis(0.0, max(last, 1.0), LEFT, RIGHT, tuple(nice_ticks(0.0, last, 5, whole=True)))
    y = loss_axis([loss for _, loss in each_step], [loss for _, loss in shown], BOTTOM, TOP)
    lines, words = [], []
    for name in runs:
        best_at, best = min(held_out[name], key=lambda point: point[1], default=(0.0, 0.0))
        dots = [
            Dot(x.place(step), y.place(loss), f"{name}, step {count(step)}: held-out loss {number(loss)}", loss == best)
            for step, loss in held_out[name]
        ]
        inside = thinned([(step, loss) for step, loss in each_step if loss <= y.high])
        points = "".join(f"M{x.place(step)} {y.place(loss)}h0" for step, loss in inside)
        lines.append(Line(name, _path(thinned(smooth[name]), x, y), dots, points))
        facts = []
        if losses := [loss for _, loss in smooth[name]]:
            facts.append(
                f"training loss {number(losses[0])} to {number(losses[-1])} in {count(smooth[name][-1][0])} steps"
            )
        if dots:
            facts.append(f"best held-out loss {number(best)} at step {count(best_at)}")
        words.append(f"{name}: {', '.join(facts) or 'no loss'}")
    picture = _drawn(
        title="Loss against optimizer step",
        x_name="optimizer step",
        lines=lines,
        x_ticks=x.labels(count),
        y_ticks=y.labels("{:g}".format),
        text="; ".join(words),
    )
    return picture, "; ".join(words)


def series(records: Sequence[Mapping[str, Any]], kind: str, key: str) -> list[Point]:
    """(step, value) of one kind of record, by step. A resumed run repeats steps: the later record counts."""
    by_step: dict[float, float] = {}
    for record in records:
        step, value = finite(record.get("step")), finite(record.get(key))
        if record.get("kind") == kind and step is not None and value is not None:
            by_step[step] = value
    return sorted(by_step.items())


def smoothed(series: Sequence[Point]) -> list[Point]:
    """Means of the values around each, a twentieth of the series on either side; of their logarithms if all have one.

    A mean of what came before lies above a falling loss, and one of the losses themselves above their middle on a
    logarithmic axis. Near the start both sides are as short as the earlier one; at the end only the later one is.
    """
    is_log = all(value > 0 for _, value in series)
    sums = [0.0, *itertools.accumulate(math.log(value) if is_log else value for _, value in series)]
    reach, result = max(len(series) // 20, 3), []
    for index, (step, _) in enumerate(series):
        first, last = max(index - reach, 0), min(index + min(reach, index), len(series) - 1)
        mean = (sums[last + 1] - sums[first]) / (last + 1 - first)
        result.append((step, math.exp(mean) if is_log else mean))
    return result


def thinned(series: Sequence[Point]) -> Sequence[Point]:
    """At most MAX_POINTS of the series, evenly spread, always with its first and last point."""
    if len(series) <= MAX_POINTS:
        return series
    stride = (len(series) - 1) / (MAX_POINTS - 1)
    return [series[round(index * stride)] for index in range(MAX_POINTS)]


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{x.place(across)} {y.place(up)}" for across, up in points) if points else ""


def rates_picture(result: SweepResult) -> str:
    """The SVG of a sweep, as text: validation loss against learning rate, for each method."""
    tried = [rate for tuned in result.tuned for rate in tuned.rates]
    low, high = (by(rate.learning_rate for rate in tried) for by in (min, max))
    decades = range(math.ceil(math.log10(low) - 0.1), math.floor(math.log10(high) + 0.1) + 1)
    x = Axis(low / 10**0.1, high * 10**0.1, LEFT, RIGHT, tuple(10.0**power for power in decades), is_log=True)
    y = axis_of((rate.loss for rate in tried if rate.loss is not None), pad=0.08, start=BOTTOM, end=TOP)
    y = replace(y, ticks=tuple(nice_ticks(y.low, y.high, 5)))
    lines = []
    for tuned in result.tuned:
        dots = []
        for rate in tuned.rates:
            if rate.loss is not None:
                text = f"{tuned.method} at {rate.learning_rate:.3g}: {rate.loss:.4f}"
                low, high = (min(max(end, y.low), y.high) for end in rate.ci95 or (rate.loss, rate.loss))
                stopped = ", stopped early" if "stopped" in rate.statuses else ""
                is_best = rate.learning_rate == tuned.learning_rate
                at = x.place(rate.learning_rate), y.place(rate.loss)
                dots.append(Dot(*at, text + stopped, is_best, y.place(low), y.place(high)))
        points = [(rate.learning_rate, rate.loss) for rate in tuned.rates if rate.loss is not None]
        crossed = replace(x, ticks=tuple(rate.learning_rate for rate in tuned.rates if rate.loss is None))
        name = f"{tuned.method}, rank {tuned.rank}"
        lines.append(Line(name, _path(points, x, y), dots, diverged=crossed.labels("{:.3g}".format)))
    return _drawn(
        title="Validation loss against learning rate",
        x_name="learning rate",
        lines=lines,
        x_ticks=x.labels("{:.3g}".format),
        y_ticks=y.labels(number),
        text=result.verdict,
    )


def _drawn(**parts: Any) -> str:
    return template("lines.html").render(size=SIZE, box=(LEFT, TOP, RIGHT, BOTTOM), colours=COLOURS, **parts)
