"""The loss curves of several runs in one picture: a self-contained SVG in the style of a sweep's rates."""

from collections.abc import Mapping, Sequence
from typing import Any

from components.report.forest import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    Mark,
    Point,
    loss_axis,
    nice_ticks,
    series,
    smoothed,
    thinned,
)
from components.report.html import count, number, template

TICKS = 5


def picture(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """The SVG, with smoothed training losses as lines and held-out losses as circles; None if no run has any.

    `runs` are the records of each run's metrics, by its name.
    """
    trained = {name: smoothed(series(records, "train", "loss")) for name, records in runs.items()}
    held_out = {name: series(records, "eval", "loss") for name, records in runs.items()}
    points = [point for each in (*trained.values(), *held_out.values()) for point in each]
    if not points:
        return None
    last = max(step for step, _ in points)
    axis = loss_axis([], [loss for _, loss in points])

    def place(point: Point) -> Point:
        share = point[0] / max(last, 1), axis.share(point[1])
        return round(LEFT + share[0] * (WIDTH - RIGHT - LEFT), 1), round(HEIGHT - BOTTOM - share[1] * _HEIGHT, 1)

    lines = [
        Line(
            name=name,
            colour=COLOURS[index % len(COLOURS)],
            path=" ".join(
                f"{'L' if at else 'M'}{x} {y}" for at, (x, y) in enumerate(map(place, thinned(trained[name])))
            ),
            marks=tuple(_mark(name, point, place(point)) for point in held_out[name]),
            diverged=(),
            label_y=TOP + 20.0 * (index + 1),
        )
        for index, name in enumerate(runs)
    ]
    return template("rates.html").render(
        title="Loss against optimizer step",
        x_name="optimizer step",
        width=WIDTH,
        height=HEIGHT,
        box=(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
        lines=lines,
        x_ticks=[(place((step, axis.low))[0], count(step)) for step in nice_ticks(0, last, TICKS, whole=True)],
        y_ticks=[(place((0, value))[1], f"{value:g}") for value in axis.ticks],
        text="; ".join(_in_words(name, trained[name], held_out[name]) for name in runs),
    )


_HEIGHT = HEIGHT - BOTTOM - TOP


def _mark(name: str, point: Point, at: Point) -> Mark:
    text = f"{name}, step {count(point[0])}: held-out loss {number(point[1])}"
    return Mark(x=at[0], y=at[1], low=at[1], high=at[1], is_best=False, text=text)


def _in_words(name: str, trained: Sequence[Point], held_out: Sequence[Point]) -> str:
    ends = [f"{what} {number(each[-1][1])}" for what, each in (("training", trained), ("held-out", held_out)) if each]
    return f"{name} ends at {' and '.join(ends)}" if ends else f"{name} has no curve"
