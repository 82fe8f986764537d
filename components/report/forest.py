"""A forest plot: several gains between their bounds, one below the other, on one axis."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.records.steps import finite
from components.records.sweep import RateLoss, SweepResult, Tuned
from components.report.html import count, number, template
from components.shared.metrics import Metric


@dataclass(frozen=True)
class Gain:
    """A gain and its bounds. A bound that is None is not finite."""

    name: str
    about: str
    gain: float
    lower: float | None
    upper: float | None
    bad: bool


@dataclass(frozen=True)
class Row:
    """A gain as it is drawn. Positions are in per cent of the axis."""

    name: str
    about: str
    position: float
    low: float
    high: float
    text: str
    bad: bool


@dataclass(frozen=True)
class Picture:
    """The whole plot, with the gains in the order given."""

    rows: tuple[Row, ...]
    zero: float
    bound: float
    note: str


def draw(gains: Sequence[Gain], *, bound: float, amounts: Metric, note: str) -> Picture:
    """Place the gains on an axis that holds every interval, zero, and the bound."""
    ends = [end for each in gains for end in (each.gain, each.lower, each.upper) if end is not None]
    marks = [0.0, bound, *ends]
    pad = (max(marks) - min(marks)) * 0.03 or 1.0
    start, span = min(marks) - pad, max(marks) - min(marks) + 2 * pad

    def place(value: float) -> float:
        return (value - start) / span * 100

    rows = tuple(
        Row(
            name=each.name,
            about=each.about,
            position=place(each.gain),
            low=0.0 if each.lower is None else place(each.lower),
            high=100.0 if each.upper is None else place(each.upper),
            text=f"{amounts.signed_text(each.gain)} ({_lies(each, amounts)})",
            bad=each.bad,
        )
        for each in gains
    )
    return Picture(rows, place(0.0), place(bound), note)


def _lies(gain: Gain, amounts: Metric) -> str:
    if gain.lower is None or gain.upper is None:
        return amounts.range_text(gain.lower, gain.upper)
    return f"{amounts.signed_text(gain.lower)} to {amounts.signed_text(gain.upper)}"


# Geometry of the loss curve, in per cent of the plot: the plot scales with the page, its text does not.

MAX_POINTS = 400  # more would not be seen and would only make the page larger
LOG_FROM = 4.0
"""Ratio of the highest to the lowest loss from which on the axis is logarithmic."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A label on an axis and where it stands."""

    position: float
    label: str


@dataclass(frozen=True)
class Dot:
    """One measurement on held-out records."""

    x: float
    y: float
    text: str
    is_best: bool


@dataclass(frozen=True)
class Curve:
    """The loss curve of one run, ready to draw. Paths live in a box of 1000 by 1000."""

    points: str
    smooth: str
    learning_rate: str
    held_out: str
    dots: tuple[Dot, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    peak_learning_rate: float | None
    is_log: bool
    """Whether the loss has a logarithmic scale."""
    num_above: int
    """Points above the top of the plot, which are left out."""
    text: str
    """What the curve shows, for those who do not see it."""


def loss_curve(records: Sequence[Mapping[str, Any]]) -> Curve | None:
    """The curve of metrics.jsonl, or None when it has no finite training or held-out loss."""
    train = series(records, "train", "loss")
    held_out = series(records, "eval", "loss")
    if not train and not held_out:
        return None
    rates = series(records, "train", "learning_rate")
    smooth = smoothed(train)
    first = min(step for step, _ in train + held_out)
    last = max(step for step, _ in train + held_out)
    axis = loss_axis([loss for _, loss in train], [loss for _, loss in smooth + held_out])

    def place(point: Point) -> Point:
        return (point[0] - first) / max(last - first, 1) * 100, 100 - 100 * axis.share(point[1])

    peak = max((rate for _, rate in rates), default=0.0)
    best = min((loss for _, loss in held_out), default=None)
    inside = [point for point in train if point[1] <= axis.high]
    return Curve(
        points=" ".join(f"M{_at(place(point))}h0" for point in thinned(inside)),
        smooth=_path([place(point) for point in thinned(smooth)]),
        # The rate has no axis: its peak touches 40 % of the height, out of the way of the early, high losses.
        learning_rate=_path([(place((step, axis.low))[0], 100 - 40 * rate / peak) for step, rate in thinned(rates)])
        if peak
        else "",
        held_out=_path([place(point) for point in held_out]),
        dots=tuple(
            Dot(*place((step, loss)), f"step {count(step)}: held-out loss {number(loss)}", loss == best)
            for step, loss in held_out
        ),
        x_ticks=tuple(
            Tick(place((value, axis.low))[0], count(value)) for value in nice_ticks(first, last, 5, whole=True)
        ),
        y_ticks=tuple(Tick(place((first, value))[1], f"{value:g}") for value in axis.ticks),
        peak_learning_rate=peak or None,
        is_log=axis.is_log,
        num_above=len(train) - len(inside),
        text=_in_words(smooth, held_out),
    )


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


def thinned(series: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS of the series, evenly spread, always with its first and last point."""
    if len(series) <= MAX_POINTS:
        return list(series)
    stride = (len(series) - 1) / (MAX_POINTS - 1)
    return [series[round(index * stride)] for index in range(MAX_POINTS)]


def nice_ticks(low: float, high: float, num_wanted: int, *, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that lie between `low` and `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / num_wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= rough * 0.999)
    if whole:
        step = max(step, 1.0)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [round(index * step, 10) for index in range(first, last + 1)]
    return ticks or [low]


def series(records: Sequence[Mapping[str, Any]], kind: str, key: str) -> list[Point]:
    """(step, value) of one kind of record, by step. A resumed run repeats steps: the later record counts."""
    by_step: dict[float, float] = {}
    for record in records:
        step, value = finite(record.get("step")), finite(record.get(key))
        if record.get("kind") == kind and step is not None and value is not None:
            by_step[step] = value
    return sorted(by_step.items())


@dataclass(frozen=True)
class LossAxis:
    """From `low` to `high`; logarithmic where a linear one would show the start of a training and nothing after it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool

    def share(self, value: float) -> float:
        """How far up the axis the value lies, from 0 to 1."""
        scale = math.log if self.is_log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))


def loss_axis(points: Sequence[float], lines: Sequence[float]) -> LossAxis:
    """An axis with every value of the lines, and the points but for the highest fiftieth."""
    shown = [*lines, *sorted(points)[: math.ceil(len(points) * 0.98)]]
    low, high = min(shown), max(shown)
    if low > 0 and high / low >= LOG_FROM:
        low, high = low * 0.97, high * 1.03
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        multiples = (1, 2, 3, 5) if high / low < 30 else (1, 3)
        ticks = [multiple * 10.0**power for power in powers for multiple in multiples]
        return LossAxis(low, high, tuple(float(f"{each:.6g}") for each in ticks if low <= each <= high), is_log=True)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = max(low - margin, 0.0) if low >= 0 else low - margin, high + margin
    ticks = nice_ticks(low, high, 5)
    return LossAxis(min(low, ticks[0]), max(high, ticks[-1]), tuple(ticks), is_log=False)


def _in_words(smooth: Sequence[Point], held_out: Sequence[Point]) -> str:
    sentences = []
    if smooth:
        sentences.append(
            f"The smoothed training loss went from {number(smooth[0][1])} to {number(smooth[-1][1])} "
            f"over {count(smooth[-1][0])} steps."
        )
    if held_out:
        step, best = min(held_out, key=lambda point: point[1])
        sentences.append(f"The best held-out loss is {number(best)}, at step {count(step)}.")
    return " ".join(sentences)


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(_at(point) for point in points) if points else ""


def _at(point: Point) -> str:
    return f"{point[0] * 10:.1f} {point[1] * 10:.1f}"


# Validation loss against learning rate, for each method that was swept: the geometry of the picture, in its own units.
#
# The picture is a self-contained SVG: part of the report's page, and a file beside the sweep's record.

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 24, 48
TICKS = 5
# Distinguishable to most people with a colour vision deficiency (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#8c6d31")


@dataclass(frozen=True)
class Mark:
    """One point of a line, such as a learning rate with its loss."""

    x: float
    y: float
    low: float
    """The y of the interval's lower end; equal to `y` if there is no interval."""
    high: float
    is_best: bool
    text: str


@dataclass(frozen=True)
class Line:
    """One line of the picture, such as the rates of one method."""

    name: str
    colour: str
    path: str
    marks: tuple[Mark, ...]
    diverged: tuple[tuple[float, str], ...]
    """The rates that diverged: the place on the x axis, and the rate as text."""
    label_y: float


def picture(result: SweepResult) -> str:
    """The SVG, as text."""
    rates = [rate.learning_rate for tuned in result.tuned for rate in tuned.rates]
    losses = [rate.loss for tuned in result.tuned for rate in tuned.rates if rate.loss is not None]
    low, high = min(losses), max(losses)
    margin = 0.08 * ((high - low) or 1.0)
    y_range = (low - margin, high + margin)
    x_range = (math.log10(min(rates)) - 0.1, math.log10(max(rates)) + 0.1)
    return template("rates.html").render(
        title="Validation loss against learning rate",
        x_name="learning rate",
        width=WIDTH,
        height=HEIGHT,
        box=(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
        lines=[_line(place, tuned, x_range, y_range) for place, tuned in enumerate(result.tuned)],
        x_ticks=[(_x(rate, x_range), f"{rate:.3g}") for rate in _decades(*x_range)],
        y_ticks=[
            (_y(value, y_range), number(value))
            for value in (y_range[0] + step * (y_range[1] - y_range[0]) / (TICKS - 1) for step in range(TICKS))
        ],
        text=result.verdict,
    )


def _line(place: int, tuned: Tuned, x_range: tuple[float, float], y_range: tuple[float, float]) -> Line:
    known = [(rate, rate.loss) for rate in tuned.rates if rate.loss is not None]
    marks = tuple(_mark(rate, loss, tuned, x_range, y_range) for rate, loss in known)
    return Line(
        name=f"{tuned.method}, rank {tuned.rank}",
        colour=COLOURS[place % len(COLOURS)],
        path=" ".join(f"{'L' if i else 'M'}{mark.x:.1f} {mark.y:.1f}" for i, mark in enumerate(marks)),
        marks=marks,
        diverged=tuple(
            (_x(rate.learning_rate, x_range), f"{rate.learning_rate:.3g}") for rate in tuned.rates if rate.loss is None
        ),
        label_y=TOP + 20.0 * (place + 1),
    )


def _mark(
    rate: RateLoss, loss: float, tuned: Tuned, x_range: tuple[float, float], y_range: tuple[float, float]
) -> Mark:
    low, high = rate.ci95 or (loss, loss)
    return Mark(
        x=_x(rate.learning_rate, x_range),
        y=_y(loss, y_range),
        low=_y(max(low, y_range[0]), y_range),
        high=_y(min(high, y_range[1]), y_range),
        is_best=rate.learning_rate == tuned.learning_rate,
        text=f"{tuned.method} at {rate.learning_rate:.3g}: {loss:.4f}"
        + (", stopped early" if "stopped" in rate.statuses else ""),
    )


def _x(rate: float, x_range: tuple[float, float]) -> float:
    share = (math.log10(rate) - x_range[0]) / (x_range[1] - x_range[0])
    return round(LEFT + share * (WIDTH - RIGHT - LEFT), 1)


def _y(loss: float, y_range: tuple[float, float]) -> float:
    share = (loss - y_range[0]) / (y_range[1] - y_range[0])
    return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)


def _decades(low: float, high: float) -> list[float]:
    return [10.0**exponent for exponent in range(math.ceil(low), math.floor(high) + 1)]
