"""`fineloop compare`."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands.arguments import Answer, add_command, add_config, add_home
from pipelines.commands.opened_registry import opened_registry
from pipelines.commands.table import table

if TYPE_CHECKING:
    from pipelines.local.side_by_side import Compared, Side

SHOWN = 5
"""Records that turned, on the screen; --json and --html have all."""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "compare",
        _compare,
        does="Compare runs: their configs, their metrics, and the records that turned right or wrong.",
        more="Every run after the first is compared with it on the records that both were measured on, with the "
        "gate's bounds. Nothing is evaluated again.",
        example="fineloop compare 20261126-0200 icd10-chapters@production --html side-by-side.html",
    )
    parser.add_argument(
        "first", metavar="RUN|NAME@VERSION", help="a run, by its id or the beginning of it, or a version"
    )
    parser.add_argument("others", nargs="+", metavar="RUN|NAME@VERSION", help="what to compare with it")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it as a page, with curves and all records")
    add_config(parser)
    add_home(parser)


def _compare(options: argparse.Namespace) -> Answer:
    from pipelines.local.side_by_side import compare, differing, read

    with opened_registry(options) as store:
        sides = [read(store, wanted) for wanted in (options.first, *options.others)]
    keys = differing(sides)
    beside = [compare(sides[0], other) for other in sides[1:]]
    body: dict[str, Any] = {
        "runs": [
            {"name": each.name, "run_id": each.run_id, "version": each.version, "note": each.note}
            | {"metrics": dict(each.metrics)}
            for each in sides
        ],
        "config": keys,
        "against_first": [asdict(each) for each in beside],
    }
    lines = list(_lines(sides, keys, beside))
    if options.html is not None:
        options.html.write_text(_page(sides, keys, beside), encoding="utf-8")
        body["page"] = str(options.html)
        lines += ["", f"page: {options.html}"]
    return Answer(body, "\n".join(lines))


def _page(sides: "Sequence[Side]", keys: Mapping[str, list[Any]], beside: "Sequence[Compared]") -> str:
    from components.report.side_by_side_page import Beside, Column, build_page

    return build_page(
        [Column(each.name, each.run_id, each.version or "", each.note, each.metrics) for each in sides],
        {key: list(map(_shown, values)) for key, values in keys.items()},
        [Beside(**vars(each)) for each in beside],
        {each.name: each.curve for each in sides},
        generated_at=datetime.now(UTC),
    )


def _lines(sides: "Sequence[Side]", keys: Mapping[str, list[Any]], beside: "Sequence[Compared]") -> Iterator[str]:
    from components.report.side_by_side_page import gain_text, metric_rows
    from components.shared.metrics import metric_of

    names = [each.name for each in sides]
    yield table([("config", *names), *((key, *map(_shown, values)) for key, values in keys.items())])
    yield ""
    yield table([("metric", *names), *((name, *row) for name, row in metric_rows([each.metrics for each in sides]))])
    for each, side in zip(beside, sides[1:], strict=True):
        if side.version and side.version == sides[0].version:
            yield f"\n{each.name} and {names[0]} are the same version, {side.version}"
            continue
        yield f"\n{each.name} against {names[0]}, on {each.records} records"
        for key, found in each.gains.items():
            yield f"  {metric_of(key).label}: {gain_text(key, found, each.confidence)}"
        right = sum(record.is_right for record in each.turned)
        yield f"  {right} turned right, {len(each.turned) - right} wrong"
        for record in each.turned[:SHOWN]:
            sign = "right" if record.is_right else "wrong"
            yield f"    {sign}  {_clip(record.prompt)} -> {_clip(record.after)} (was {_clip(record.before)})"


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:39] + "…"
