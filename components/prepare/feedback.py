"""Reads `data.feedback`: what people said of logged answers, by the answers' ids."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from components.config.train import DataConfig
from components.prepare.rows import Unreadable, read_rows
from components.prepare.sources import Source, find_sources, local_copies
from components.prepare.traces import Key, Verdict, Vote, resolved, vote_of
from components.registry.between_runs import NONE_ERASED, Erased
from components.shared.errors import DataError


class Feedback(NamedTuple):
    """All feedback, and what became of its rows."""

    verdicts: Mapping[Key, Verdict] = {}
    rows: int = 0
    unusable: Mapping[str, int] = {}
    """Rows by the reason for which they were not read."""


def read_feedback(data: DataConfig, erased: Erased = NONE_ERASED) -> Feedback:
    """Read the feedback. Of one rater's rows on one answer the last counts, by their time, else by their order.

    Raises:
        DataError: a source cannot be read, or more than data.max_reject_share of the rows say nothing.
        StoreError: an s3:// source cannot be read.
    """
    last: dict[Key, dict[tuple[str, str], Vote]] = {}
    unusable: Counter[str] = Counter()
    rows = 0
    with _as_feedback():
        for source, path in local_copies(sources_of_feedback(data)):
            for batch in read_rows(source.name, path, wanted=lambda columns: columns):
                for row in batch.rows:
                    rows += 1
                    try:
                        if isinstance(row.value, Unreadable) or not isinstance(row.value, dict):
                            raise DataError(getattr(row.value, "reason", "it is no object"))
                        vote = vote_of(row.value, key=data.feedback_key, least=data.feedback_good)
                    except DataError as exc:
                        unusable[str(exc)] += 1
                        continue
                    votes = last.setdefault(vote.key, {}) if vote.rater not in erased else {}
                    before = votes.get((vote.rater, vote.criterion))
                    if before is None or vote.time >= before.time:
                        votes[vote.rater, vote.criterion] = vote
    bad = unusable.total()
    if bad > data.max_reject_share * rows:
        reasons = "".join(f"\n  {count:,} x {reason}" for reason, count in unusable.most_common(3))
        raise DataError(
            f"{bad:,} of {rows:,} rows of data.feedback are unusable, more than data.max_reject_share = "
            f"{data.max_reject_share:g} allows:{reasons}"
        )
    verdicts = {key: resolved(votes.values()) for key, votes in last.items()}
    return Feedback(verdicts, rows, unusable)


def sources_of_feedback(data: DataConfig) -> list[Source]:
    """The files that data.feedback names; raises as `find_sources`."""
    with _as_feedback():
        return find_sources(data.feedback) if data.feedback else []


@contextmanager
def _as_feedback() -> Iterator[None]:
    try:
        yield
    except DataError as exc:
        raise DataError(str(exc).replace("data.source", "data.feedback")) from exc
