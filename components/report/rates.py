"""Validation loss against learning rate, for each method that was swept: the geometry of the picture, in its own units.

The picture is a self-contained SVG: part of the report's page, and a file beside the sweep's record.
"""

import math
from dataclasses import dataclass

from components.records.sweep import RateLoss, SweepResult, Tuned
from components.report.html import template
from components.report.numbers import number

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
