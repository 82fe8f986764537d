"""Which records are kept, and on which side of the split each one stands.

All of it is decided by hashes of the records themselves, so that the order of files has no part in it, and a refresh
that adds rows never moves a record from eval to train.
"""

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from components.prepare.dataset import Record
from components.prepare.news import narrow
from components.prepare.validate import KeyedRecord, canonical_prompt, ids_of
from components.shared.errors import DataError

if TYPE_CHECKING:
    from components.prepare.near_duplicates import Comparison

CLUSTERS_SHOWN, WORDS_SHOWN, CHARS_SHOWN = 5, 12, 100


@dataclass(frozen=True)
class Deduplicated:
    """Distinct records, and how many others were dropped."""

    records: list[KeyedRecord]
    duplicates: int
    """Same prompt and answer as another record."""
    superseded: int
    """Same id as a later row with other content."""


@dataclass(frozen=True)
class TrainEvalSplit:
    """Both splits, each in the order of its records' places, and how many records are in neither."""

    train: list[Record]
    evaluation: list[Record]
    prompt_in_eval: int
    """Left out of train because the same prompt stands in eval."""
    near_duplicate_of_eval: int
    """Left out of train because a prompt much like it stands in eval."""
    before_window: int
    """Left out of train by data.window_days."""
    replayed: int
    """In train although they stand before the window."""
    over_max_records: int
    """Left out by data.max_records."""
    near_share: float = 0.0
    """Of the records that were compared with what is held out, the share that was left out."""
    near_clusters: tuple[tuple[str, int], ...] = ()
    """The first words of what most of them are near to, and how many are."""
    near_in_train: int = 0
    """In train although a prompt much like it stands there too."""


def deduplicate(rows: Iterable[KeyedRecord]) -> Deduplicated:
    """Keep the last row of each id, then one record of each content.

    Of records with the same content the one with the smallest place stays. A new duplicate can thus move the content
    towards eval, whose places are the small ones, and never away from it.
    """
    latest: dict[bytes, KeyedRecord] = {}
    chosen: dict[bytes, KeyedRecord] = {}
    duplicates = superseded = 0
    for row in rows:
        # Rows without an id share a key when they share a prompt; with another answer they are records of their own.
        identity = row.key if row.named else row.content
        previous = latest.get(identity)
        if previous is not None:
            if previous.content == row.content:
                duplicates += 1
            else:
                superseded += 1
        latest[identity] = row
    for row in latest.values():
        rival = chosen.get(row.content)
        if rival is not None:
            duplicates += 1
            if (rival.place, rival.key) < (row.place, row.key):
                continue
        chosen[row.content] = row
    return Deduplicated(_named_apart(chosen.values()), duplicates, superseded)


def _named_apart(rows: Iterable[KeyedRecord]) -> list[KeyedRecord]:
    """No two records of one id: where a row gave one that another record has by its content, that one gets a longer."""
    rows = list(rows)
    given = {row.record.id for row in rows if row.named}

    def renamed(row: KeyedRecord) -> KeyedRecord:
        if row.named or row.record.id not in given:
            return row
        *_, longer = ids_of(row)
        while longer in given:
            longer += "-"
        return replace(row, record=replace(row.record, id=longer))

    return [renamed(row) for row in rows]


def split(
    records: Iterable[KeyedRecord],
    *,
    eval_share: float,
    max_records: int,
    near_duplicates: float = 0.0,
    max_near_share: float = 1.0,
    window: Set[bytes] | None = None,
    replay_share: float = 0.0,
) -> TrainEvalSplit:
    """Divide distinct records by the hash of what they belong to, which is their group's name or else their own key.

    Args:
        records: Distinct records in any order.
        eval_share: Records whose hash, as a fraction of all hashes, is below this are held out.
        max_records: Keep this many, the smallest hashes of each split, in eval_share's proportion; 0 keeps all.
        near_duplicates: Prompts as similar as this to one in eval are left out of train; 0 leaves none out. With
            max_records and without a window only as many records are compared as are needed.
        max_near_share: Share of the compared records that may be left out so.
        window: Contents to train on, None for all; what is held out comes from all records.
        replay_share: Share of train to draw from outside the window.

    Raises:
        DataError: a split is empty, or too much is near what is held out.
    """
    ordered = sorted(records, key=lambda each: (each.place, each.key, each.content))
    evaluation = [each for each in ordered if position(each.place) < eval_share]
    held_out_prompts = {canonical_prompt(each.record.prompt) for each in evaluation}
    rest = ordered[len(evaluation) :]
    others = [each for each in rest if canonical_prompt(each.record.prompt) not in held_out_prompts]
    enough = None if window is not None or not max_records else _most_train(max_records, len(evaluation), eval_share)
    unlike = _unlike(others, evaluation, similarity=near_duplicates, enough=enough)
    _require_few(unlike, max_near_share=max_near_share, similarity=near_duplicates)
    narrowed = narrow(unlike.records, window, replay_share=replay_share)
    train = narrowed.records
    num_train, num_eval = _sizes(len(train), len(evaluation), eval_share=eval_share, max_records=max_records)
    if not num_train or not num_eval:
        limited = f" and data.max_records = {max_records}" if max_records else ""
        remedy = "raise data.eval_share" if not num_eval else "lower data.eval_share"
        raise DataError(
            f"{len(ordered)} distinct records are too few: with data.eval_share = {eval_share:g}{limited}, "
            f"{num_train} are in train and {num_eval} in eval, and neither may be empty. Add records or {remedy}"
            f"{', or raise data.max_records' if max_records else ''}."
        )
    return TrainEvalSplit(
        train=[each.record for each in train[:num_train]],
        evaluation=[each.record for each in evaluation[:num_eval]],
        prompt_in_eval=len(rest) - len(others),
        near_duplicate_of_eval=unlike.left_out,
        before_window=narrowed.before_window,
        replayed=narrowed.replayed,
        over_max_records=len(train) - num_train + len(evaluation) - num_eval + unlike.unread,
        near_share=unlike.share,
        near_clusters=unlike.clusters,
        near_in_train=unlike.repeats(train[:num_train]),
    )


@dataclass(frozen=True)
class _Unlike:
    """The records that are near none held out, as far as they were looked at."""

    records: list[KeyedRecord]
    left_out: int = 0
    unread: int = 0
    clusters: tuple[tuple[str, int], ...] = ()
    comparison: "Comparison | None" = None

    @property
    def share(self) -> float:
        """Of those that were looked at, how many were left out."""
        return self.left_out / max(1, self.left_out + len(self.records))

    def repeats(self, records: Sequence[KeyedRecord]) -> int:
        """How many of them are near an earlier one."""
        return self.comparison.repeats([_asked(each) for each in records]) if self.comparison and records else 0


def _unlike(
    records: Sequence[KeyedRecord], evaluation: Sequence[KeyedRecord], *, similarity: float, enough: int | None
) -> _Unlike:
    """In their order, until there are enough; None goes through all."""
    if not similarity or not evaluation or not records:
        return _Unlike(list(records))
    from components.prepare.near_duplicates import Comparison

    asked, held_out = [_asked(each) for each in records], [_asked(each) for each in evaluation]
    comparison = Comparison(asked, held_out, similarity=similarity)
    unlike: list[KeyedRecord] = []
    near: Counter[str] = Counter()
    for record, row in zip(records, comparison.near_held_out(asked), strict=True):
        if row is None:
            unlike.append(record)
        else:
            near[" ".join(held_out[row].split()[:WORDS_SHOWN])[:CHARS_SHOWN]] += 1
        if len(unlike) == enough:
            break
    left_out = near.total()
    return _Unlike(
        unlike, left_out, len(records) - len(unlike) - left_out, tuple(near.most_common(CLUSTERS_SHOWN)), comparison
    )


def _require_few(unlike: _Unlike, *, max_near_share: float, similarity: float) -> None:
    if unlike.share <= max_near_share:
        return
    lines = "".join(f"\n  {count} x near {words!r}" for words, count in unlike.clusters)
    raise DataError(
        f"{unlike.share:.1%} of what would be trained on is near what is held out ({unlike.left_out} of "
        f"{unlike.left_out + len(unlike.records)} records), more than data.max_near_share = {max_near_share:g} "
        f"allows:{lines}\n"
        "Where such records belong together, as questions on one document do, name the column that says so in "
        f"data.group. Where they do not, raise data.near_duplicates, which is {similarity:g}; 0 compares none. "
        "Raise data.max_near_share to train without them."
    )


def _asked(record: KeyedRecord) -> str:
    return "\n".join(turn.content for turn in record.record.prompt if turn.role != "system")


def position(place: bytes) -> float:
    """Where a hash lies among all hashes, in [0, 1]."""
    return int.from_bytes(place[:8]) / 2**64


def _sizes(num_train: int, num_eval: int, *, eval_share: float, max_records: int) -> tuple[int, int]:
    """How many of each split to keep; where one is too short for its part, the other fills up."""
    if not max_records or num_train + num_eval <= max_records:
        return num_train, num_eval
    kept_train = min(num_train, _most_train(max_records, num_eval, eval_share))
    return kept_train, min(num_eval, max_records - kept_train)


def _most_train(max_records: int, num_eval: int, eval_share: float) -> int:
    """How many of max_records are train's, where it has as many."""
    return max_records - min(num_eval, max(1, round(max_records * eval_share)))
