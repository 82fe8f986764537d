"""What is new since the adapter's last finished run, and which records fall into the window; pure."""

import hashlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from components.prepare.intake import Intake
from components.prepare.sources import Source
from components.prepare.validate import KeyedRecord

if TYPE_CHECKING:
    import pyarrow as pa

    from components.registry.watermark import Consumed


@dataclass(frozen=True)
class Narrowed:
    """The records to train on, in the order they came in, and where the others went."""

    records: list[KeyedRecord]
    before_window: int
    """Left out because the window begins after them."""
    replayed: int
    """Taken from before the window."""


def new_sources(sources: Iterable[Source], consumed: "Consumed | None") -> list[Source]:
    """The files and objects that came, or changed, since then."""
    seen = consumed.sources if consumed else {}
    return [each for each in sources if seen.get(each.name) != each.fingerprint]


def count_new(contents: "pa.UInt64Array", known: "pa.UInt64Array") -> int:
    """Of distinct contents, by their ids, those that were not there then: added or changed, wherever they stand."""
    import pyarrow.compute as pc

    return len(contents) - (pc.sum(pc.is_in(contents, value_set=known)).as_py() or 0)


def in_window(intake: Intake, *, days: float) -> Set[bytes]:
    """Contents that a file or object of the last `days` before the newest one holds.

    The window ends at the newest source, not today, so that a step that is retried tomorrow makes the same dataset.
    What has no time, the example, is always in it.
    """
    times = [source.modified_at for source, _ in intake.by_source() if source.modified_at]
    begin = max(times) - timedelta(days=days) if times else None
    return {
        record.content
        for source, records in intake.by_source()
        if begin is None or source.modified_at is None or source.modified_at >= begin
        for record in records
    }


def narrow(records: Sequence[KeyedRecord], window: Set[bytes] | None, *, replay_share: float) -> Narrowed:
    """Keep the records in the window, and enough earlier ones to make up `replay_share` of the result.

    Which earlier ones is decided by a hash salted with the window's content: each refresh replays others, and the same
    data always gives the same choice. None as the window keeps everything.
    """
    if window is None:
        return Narrowed(list(records), 0, 0)
    recent = [each for each in records if each.content in window]
    earlier = [each for each in records if each.content not in window]
    wanted = min(len(earlier), round(len(recent) * replay_share / (1 - replay_share)))
    salt = hashlib.sha256(b"".join(each.content for each in recent)).digest()
    drawn = sorted(earlier, key=lambda each: hashlib.sha256(salt + each.content).digest())[:wanted]
    kept = {each.content for each in recent} | {each.content for each in drawn}
    return Narrowed([each for each in records if each.content in kept], len(earlier) - wanted, wanted)
