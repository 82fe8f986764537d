"""Draws logged answers for an audit, and writes the file in which people label them."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.config.schema import RunConfig
from components.prepare.audit import draw, name_of_draw
from components.prepare.dataset import WHERE_ANY, Record, record_of
from components.prepare.feedback import OF_AUDIT, Key, Verdict, read_feedback
from components.prepare.prepare import opened, read_sources, require_usable, within_memory
from components.prepare.sources import find_sources
from components.prepare.split import deduplicate
from components.prepare.validate import Rules
from components.shared.errors import DataError


class _WhateverWasSaid(Mapping[Key, Verdict]):
    """Takes every logged answer for good, so that feedback has no say in what is drawn."""

    def __getitem__(self, key: Key) -> Verdict:
        return Verdict("rating", True, "", differ=False)

    def __iter__(self) -> Iterator[Key]:
        return iter(())

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True)
class DrawnAnswers:
    """What an audit drew."""

    name: str
    records: list[Record]
    """Each with its own answer, in the order of the draw."""
    eligible: int
    """How many answers it was drawn from."""


def draw_audit(config: RunConfig, count: int) -> DrawnAnswers:
    """Draw `count` logged answers of those that are kept apart to judge, by a hash of their ids alone. What an earlier
    audit in data.feedback drew is not drawn again.

    Raises DataError: data.source has no logged answer with an id on the held-out side that no audit has drawn, or as
    `read_sources` and `read_feedback`.
    """
    before = [audit.drawn for audit in read_feedback(config.data).audits.values()]
    with within_memory(), opened(config) as work:
        rules = Rules(config.data, (config.adapter.name, config.adapter.alias), _WhateverWasSaid())
        read = read_sources(find_sources(config.data.source), work.accept, work.reject, rules=rules)
        require_usable(read, max_reject_share=config.data.max_reject_share, columns=config.data.columns)
        work.finish()
        deduplicate(work)
        rows = work.rows(
            "SELECT records.id, number FROM chosen JOIN records USING (number)"
            f"  WHERE origin <> '' AND chosen.named AND chosen.position < '{config.data.eval_share!r}'::DOUBLE"
        )
        numbers = {record_id: number for record_id, number in rows if not any(record_id in ids for ids in before)}
        if not numbers:
            raise DataError(
                "data.source has no logged answer to draw: an audit draws from the log's answers that have an id and "
                f"are held out (data.eval_share = {config.data.eval_share:g}), and that no audit in data.feedback drew"
            )
        drawn = draw([*numbers], count)
        in_order = np.array([numbers[record_id] for record_id in drawn], np.int64)
        batches = work.in_order(in_order, ("id", "prompt", "answer", *WHERE_ANY))
        records = [record_of(row) for batch in batches for row in batch.to_pylist()]
    return DrawnAnswers(name_of_draw(drawn), records, len(numbers))


def write_audit(path: Path, drawn: DrawnAnswers, *, answers: bool) -> None:
    """Write the file to label, as CSV where it is called so, else as JSONL; with `answers` also what was answered.
    Raises DataError: there is such a file, which may hold labels."""
    rows = list[dict[str, Any]]()
    for record in drawn.records:
        row = {"response_id": record.id, "prompt": record.shown_prompt, "label": "", OF_AUDIT: drawn.name}
        if answers:
            row["answered"] = record.answer_text
        rows.append(row)
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                _write_csv(file, rows)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except FileExistsError as exc:
        raise DataError(f"{path} is there already, and may hold labels: name another file") from exc


def _write_csv(file: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    writer = csv.DictWriter(file, [*rows[0]])
    writer.writeheader()
    for row in rows:
        prompt = row["prompt"]
        text = (
            prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
        )
        writer.writerow({**row, "prompt": text})
