"""Several gains between their bounds, one under the other, on one axis."""

from collections.abc import Sequence
from dataclasses import dataclass

from components.shared.metrics import Metric


@dataclass(frozen=True)
class Gain:
    """One of them."""

    name: str
    about: str
    gain: float
    lower: float
    upper: float
    bad: bool


@dataclass(frozen=True)
class Row:
    """How it is drawn. Places are in per cent of the axis."""

    name: str
    about: str
    position: float
    low: float
    high: float
    text: str
    bad: bool


@dataclass(frozen=True)
class Picture:
    """All of them, in the order given."""

    rows: tuple[Row, ...]
    zero: float
    bound: float
    note: str


def draw(gains: Sequence[Gain], *, bound: float, amounts: Metric, note: str) -> Picture:
    """On an axis that holds every interval, zero, and the bound."""
    marks = [0.0, bound, *(end for each in gains for end in (each.lower, each.upper))]
    pad = (max(marks) - min(marks)) * 0.03 or 1.0
    start, span = min(marks) - pad, max(marks) - min(marks) + 2 * pad

    def place(value: float) -> float:
        return (value - start) / span * 100

    rows = tuple(
        Row(
            name=each.name,
            about=each.about,
            position=place(each.gain),
            low=place(each.lower),
            high=place(each.upper),
            text="{} ({} to {})".format(*map(amounts.signed_text, (each.gain, each.lower, each.upper))),
            bad=each.bad,
        )
        for each in gains
    )
    return Picture(rows, place(0.0), place(bound), note)
