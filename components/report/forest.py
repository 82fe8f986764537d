"""A forest plot: several gains between their bounds, one below the other, on one axis."""

from collections.abc import Sequence
from dataclasses import dataclass

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
