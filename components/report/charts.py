"""Charts: dots between their bounds, lines over steps or rates, and bars, each placed on axes that hold what it shows.

The templates draw them as SVG, with the same in words beside it. Positions are in per cent of the picture, which scales
with the page while its text does not; a picture of lines has units of its own, because it is also a file by itself.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from components.records.steps import finite
from components.records.sweep import SweepResult
from components.report.html import count, number, template
from components.shared.metrics import Metric

Point = tuple[float, float]


class Tick(NamedTuple):
    """A label on an axis and where it stands."""

    position: float
    label: str


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, which lie from `start` to `end` of the picture."""

    low: float
    high: float
    start: float = 0.0
    end: float = 100.0
    ticks: tuple[float, ...] = ()
    is_log: bool = False

    def share(self, value: float) -> float:
        """How far along the axis the value lies, from 0 to 1."""
        scale = math.log if self.is_log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))

    def place(self, value: float) -> float:
        """Where the value lies in the picture."""
        return round(self.start + self.share(value) * (self.end - self.start), 2)

    def labels(self, text: Callable[[float], str]) -> tuple[Tick, ...]:
        """The ticks with their texts."""
        return tuple(Tick(self.place(value), text(value)) for value in self.ticks)


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
        return Axis(low, high, start, end, tuple(each for each in round_ones if low <= each <= high), is_log=True)
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


# Several gains between their bounds, one below the other, on one axis: a forest plot.


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


@dataclass(frozen=True)
class Interval:
    """A gain where it is drawn, with no difference and the bound that it should reach, if any."""

    name: str
    about: str
    text: str
    bad: bool
    position: float
    low: float
    high: float
    zero: float
    bound: float | None
    bound_text: str


@dataclass(frozen=True)
class Forest:
    """The whole plot, with the gains in the order given."""

    rows: tuple[Interval, ...]
    note: str


def intervals_of(gains: Sequence[Gain], bound: float | None = None, bound_text: str = "") -> tuple[Interval, ...]:
    """Place gains on an axis that holds every interval, zero, and the bound."""
    ends = [end for each in gains for end in (each.gain, each.lower, each.upper) if end is not None]
    axis = axis_of([0.0, *ends, *([] if bound is None else [bound])], pad=0.05)
    return tuple(
        Interval(
            name=each.name,
            about=each.about,
            text=each.text,
            bad=each.bad,
            position=axis.place(each.gain),
            low=axis.start if each.lower is None else axis.place(each.lower),
            high=axis.end if each.upper is None else axis.place(each.upper),
            zero=axis.place(0.0),
            bound=None if bound is None else axis.place(bound),
            bound_text=bound_text,
        )
        for each in gains
    )


def bounded_text(amounts: Metric, gain: float, lower: float | None, upper: float | None) -> str:
    """A gain with its bounds, in words."""
    lies = amounts.range_text(lower, upper)
    if lower is not None and upper is not None:
        lies = f"{amounts.signed_text(lower)} to {amounts.signed_text(upper)}"
    return f"{amounts.signed_text(gain)} ({lies})"


# Losses over the steps of a training.

MAX_POINTS = 400  # more would not be seen and would only make the page larger


@dataclass(frozen=True)
class Dot:
    """A measurement, the ends of its interval if it has one, and the name beneath it if it is shown."""

    x: float
    y: float
    text: str
    is_best: bool = False
    low: float | None = None
    high: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Curve:
    """The loss curve of one run, ready to draw. Paths live in a box of 100 by 100."""

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
    train, held_out = series(records, "train", "loss"), series(records, "eval", "loss")
    if not train and not held_out:
        return None
    smooth, rates = smoothed(train), series(records, "train", "learning_rate")
    x = _steps_axis([step for step, _ in train + held_out])
    y = loss_axis([loss for _, loss in train], [loss for _, loss in smooth + held_out])
    inside = [point for point in train if point[1] <= y.high]
    peak = max((rate for _, rate in rates), default=0.0)
    best_at, best = min(held_out, key=lambda point: point[1], default=(0.0, 0.0))
    sentences = []
    if smooth:
        sentences.append(
            f"The smoothed training loss went from {number(smooth[0][1])} to {number(smooth[-1][1])} "
            f"over {count(smooth[-1][0])} steps."
        )
    if held_out:
        sentences.append(f"The best held-out loss is {number(best)}, at step {count(best_at)}.")
    return Curve(
        points=" ".join(f"M{x.place(step)} {y.place(loss)}h0" for step, loss in thinned(inside)),
        smooth=_path(thinned(smooth), x, y),
        # The rate has no axis: its peak touches 40 % of the height, out of the way of the early, high losses.
        learning_rate=_path(thinned(rates), x, Axis(0.0, peak, 100.0, 60.0)) if peak else "",
        held_out=_path(held_out, x, y),
        dots=tuple(
            Dot(x.place(step), y.place(loss), f"step {count(step)}: held-out loss {number(loss)}", loss == best)
            for step, loss in held_out
        ),
        x_ticks=x.labels(count),
        y_ticks=y.labels("{:g}".format),
        peak_learning_rate=peak or None,
        is_log=y.is_log,
        num_above=len(train) - len(inside),
        text=" ".join(sentences),
    )


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


def _steps_axis(steps: Sequence[float], start: float = 0.0, end: float = 100.0) -> Axis:
    first, last = min(steps), max(steps)
    return Axis(first, max(last, first + 1), start, end, tuple(nice_ticks(first, last, 5, whole=True)))


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{x.place(across)} {y.place(up)}" for across, up in points) if points else ""


# Several lines in one picture: a self-contained SVG, part of a page, and a file beside a sweep's record.

SIZE = (720, 380)
LEFT, RIGHT, TOP, BOTTOM = 64.0, 570.0, 24.0, 332.0
# Distinguishable to most people with a colour vision deficiency (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#8c6d31")


@dataclass(frozen=True)
class Line:
    """One line of the picture, such as the rates of one method."""

    name: str
    path: str
    dots: Sequence[Dot]
    diverged: Sequence[Tick] = field(default=())
    """The rates that diverged."""


def rates_picture(result: SweepResult) -> str:
    """The SVG of a sweep, as text: validation loss against learning rate, for each method."""
    tried = [rate for tuned in result.tuned for rate in tuned.rates]
    low, high = (by(rate.learning_rate for rate in tried) for by in (min, max))
    decades = range(math.ceil(math.log10(low) - 0.1), math.floor(math.log10(high) + 0.1) + 1)
    x = Axis(low / 10**0.1, high * 10**0.1, LEFT, RIGHT, tuple(10.0**each for each in decades), is_log=True)
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
        diverged = [rate.learning_rate for rate in tuned.rates if rate.loss is None]
        crossed = replace(x, ticks=tuple(diverged)).labels("{:.3g}".format)
        lines.append(Line(f"{tuned.method}, rank {tuned.rank}", _path(points, x, y), dots, crossed))
    labels = x.labels("{:.3g}".format), y.labels(number)
    return _drawn("Validation loss against learning rate", "learning rate", lines, labels, result.verdict)


def curves_picture(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """The SVG with the smoothed training losses of several runs as lines and held-out losses as circles; None if no run
    has any. `runs` are the records of each run's metrics, by its name."""
    trained = {name: smoothed(series(records, "train", "loss")) for name, records in runs.items()}
    held_out = {name: series(records, "eval", "loss") for name, records in runs.items()}
    points = [point for each in (*trained.values(), *held_out.values()) for point in each]
    if not points:
        return None
    x = _steps_axis([0.0, *(step for step, _ in points)], LEFT, RIGHT)
    y = loss_axis([], [loss for _, loss in points], BOTTOM, TOP)
    lines, words = [], []
    for name in runs:
        dots = [
            Dot(x.place(step), y.place(loss), f"{name}, step {count(step)}: held-out loss {number(loss)}")
            for step, loss in held_out[name]
        ]
        lines.append(Line(name, _path(thinned(trained[name]), x, y), dots))
        both = (("training", trained[name]), ("held-out", held_out[name]))
        ends = " and ".join(f"{what} {number(losses[-1][1])}" for what, losses in both if losses)
        words.append(f"{name} ends at {ends}" if ends else f"{name} has no curve")
    labels = x.labels(count), y.labels("{:g}".format)
    return _drawn("Loss against optimizer step", "optimizer step", lines, labels, "; ".join(words))


def _drawn(
    title: str, x_name: str, lines: Sequence[Line], labels: tuple[tuple[Tick, ...], tuple[Tick, ...]], text: str
) -> str:
    return template("lines.html").render(
        title=title,
        x_name=x_name,
        size=SIZE,
        box=(LEFT, TOP, RIGHT, BOTTOM),
        lines=lines,
        colours=COLOURS,
        x_ticks=labels[0],
        y_ticks=labels[1],
        text=text,
    )
