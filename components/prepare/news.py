"""What is new since the adapter's last finished run, and which records fall into the window."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from components.prepare.intake import Intake
from components.prepare.sources import Source

if TYPE_CHECKING:
    import pyarrow as pa

    from components.prepare.workspace import Workspace
    from components.registry.between_runs import Consumed


Span = tuple[int, int]
"""A range of record numbers, in the order in which they were read: the first, and one more than the last."""


@dataclass(frozen=True)
class Narrowed:
    """How many records from before the window were left out, and how many were taken."""

    before_window: int
    """Left out because the window begins after them."""
    replayed: int
    """Taken from before the window."""


def new_sources(sources: Iterable[Source], consumed: "Consumed | None") -> list[Source]:
    """The files and objects that were added or changed since `consumed`; None means all of them."""
    seen = consumed.sources if consumed else {}
    return [each for each in sources if seen.get(each.name) != each.fingerprint]


def contents(work: "Workspace") -> Iterator[bytes]:
    """Yield the sha256 of each distinct record's content, in no particular order."""
    for batch in work.batches("SELECT content FROM chosen"):
        yield from batch["content"].to_pylist()


def count_new(contents: "pa.UInt64Array", known: "pa.UInt64Array") -> int:
    """How many ids of distinct `contents` are not `known`: records that were added or changed, wherever they stand."""
    import pyarrow.compute as pc

    return len(contents) - (pc.sum(pc.is_in(contents, value_set=known)).as_py() or 0)


def in_window(intake: Intake, *, days: float) -> list[Span]:
    """The records from the files and objects that were modified in the last `days` before the newest one.

    The window ends at the newest source, not today, so that a step that is retried tomorrow makes the same dataset.
    A source without a time, such as the example, is always in it.
    """
    times = [source.modified_at for source, _ in intake.by_source() if source.modified_at]
    begin = max(times) - timedelta(days=days) if times else None
    return [
        (numbers.start, numbers.stop)
        for source, numbers in intake.by_source()
        if begin is None or source.modified_at is None or source.modified_at >= begin
    ]


def narrow(work: "Workspace", window: Sequence[Span] | None, *, replay_share: float, apart: bool = False) -> Narrowed:
    """Keep in the table `others` the records whose content is in the window, and enough earlier records to make up
    `replay_share` of the result; with `apart` the earlier ones go to the table `replayed`.

    A hash salted with the window's content chooses the earlier records: each refresh replays others, and the same data
    always gives the same choice. `window` None keeps everything.
    """
    if window is None:
        return Narrowed(0, 0)
    import pyarrow as pa

    starts, ends = ([span[place] for span in window] for place in (0, 1))
    work.put("spans", start=pa.array(starts, pa.int64()), stop=pa.array(ends, pa.int64()))
    work.run(
        "CREATE TABLE recent AS FROM others WHERE content IN"
        "  (SELECT content FROM records JOIN spans ON number >= start AND number < stop);"
        "CREATE TABLE earlier AS FROM others ANTI JOIN recent USING (number)"
    )
    num_recent, num_earlier = work.row("SELECT (SELECT count(*) FROM recent), (SELECT count(*) FROM earlier)")
    wanted = min(num_earlier, round(num_recent * replay_share / (1 - replay_share)))
    salt = hashlib.sha256()
    for batch in work.batches("SELECT content FROM recent ORDER BY place, key, content"):
        salt.update(b"".join(batch["content"].to_pylist()))
    work.run(
        f"CREATE TABLE passed AS SELECT number FROM earlier"
        f"  ORDER BY sha256('{salt.hexdigest()}'.unhex() || content) OFFSET {wanted};"
        "DELETE FROM others WHERE number IN (FROM passed)"
    )
    if apart:
        work.run(
            "CREATE TABLE replayed AS FROM others WHERE number IN (SELECT number FROM earlier);"
            "DELETE FROM others WHERE number IN (SELECT number FROM replayed)"
        )
    return Narrowed(num_earlier - wanted, wanted)
