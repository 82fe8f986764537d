"""Decides which records are kept, and on which side of the split each one is.

Hashes of the records themselves decide all of it, so that the order of files does not matter, and a refresh that adds
rows never moves a record from eval to train.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from components.config.schema import RunConfig
from components.config.train import DataConfig
from components.prepare.audit import labels_for
from components.prepare.dataset import WHERE_ANY, Parts, Record, groups_of, load_split, prompt_texts, write_splits
from components.prepare.near_duplicates import Comparison
from components.prepare.workspace import Texts, Workspace, position
from components.shared.errors import DataError
from components.store.store import Store

Span = tuple[int, int]
"""A range of record numbers, in the order in which they were read: the first, and one more than the last."""


def narrow(
    work: Workspace, window: Sequence[Span] | None, *, replay_share: float, apart: bool = False
) -> tuple[int, int]:
    """Keep in the table `others` the records whose content is in the window, and enough earlier records to make up
    `replay_share` of the result; with `apart` the earlier ones go to the table `replayed`.

    A hash salted with the window's content chooses the earlier records: each refresh replays others, and the same data
    always gives the same choice. `window` None keeps everything. Returns how many records from before the window were
    left out, and how many were taken.
    """
    if window is None:
        return 0, 0
    _put_spans(work, "spans", window)
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
    return num_earlier - wanted, wanted


def _put_spans(work: Workspace, name: str, spans: Sequence[Span]) -> None:
    starts = pa.array([start for start, _ in spans], pa.int64())
    stops = pa.array([stop for _, stop in spans], pa.int64())
    work.put(name, start=starts, stop=stops)


CLUSTERS_SHOWN, WORDS_SHOWN, CHARS_SHOWN = 5, 12, 100
_IN_ORDER = "ORDER BY place, key, content"


@dataclass(frozen=True)
class TrainEvalSplit:
    """Both sides, each in the order of its records' places, and how many records are in neither."""

    parts: Parts
    dropped: dict[str, int]
    """Records in neither side, by why, as the profile calls it. Beside what is held out are a model's own words that
    belong with it, and turns of a held-out session."""
    replayed: int
    """In train, or in the split `replay`, although they stand before the window."""
    reserved: int
    """Logged answers on the held-out side that may not judge."""
    near_duplicates: dict[str, Any]
    """Which share of the records that were compared with the held-out ones was left out, which held-out prompts most of
    them are near to (their first words, and the records), and how many stay in train beside another one."""


def deduplicate(work: Workspace, *, most_of_a_rater: int = 0) -> dict[str, int]:
    """Keep the last row of each id, then one record of each content, in the table `chosen`, and of each rater the
    records with the smallest keys, `most_of_a_rater` of them, 0 all; what an audit drew is not the rater's choice, and
    stays. Returns how many others there are, by why.

    Among records with the same content the one with the smallest place stays, first of those that an audit drew or an
    outcome came for: else an audit lost right answers that people had liked elsewhere. A new duplicate can move the
    content towards eval, whose places are the small ones, and never away from it.
    """
    # Without a log there is nothing that was drawn, and all is spared the join.
    drawn_first = "number NOT IN (SELECT number FROM records WHERE drawn <> ''), " if "drawn" in work.columns else ""
    # Rows without an id share a key when they share a prompt; with another answer they are separate records.
    work.run("CREATE VIEW identified AS SELECT *, CASE WHEN named THEN key ELSE content END AS identity FROM records")
    work.run(
        "CREATE TABLE latest AS SELECT identity, max(number) AS number, count(*) AS rows FROM identified GROUP BY ALL"
    )
    duplicates, superseded = work.row(
        "SELECT count(*) FILTER (before = content), count(*) FILTER (before <> content) FROM ("
        "  SELECT content, lag(content) OVER (PARTITION BY identity ORDER BY number) AS before FROM identified"
        "  WHERE identity IN (SELECT identity FROM latest WHERE rows > 1))"
    )
    work.run(
        "CREATE TABLE chosen AS SELECT number, position, place, key, content, turns, named"
        "  FROM records JOIN latest USING (number)"
    )
    work.run(
        "DROP TABLE latest;"
        "CREATE TABLE rivals AS SELECT number FROM ("
        f"  SELECT number, row_number() OVER (PARTITION BY content ORDER BY {drawn_first}place, key) AS rank"
        "  FROM chosen WHERE content IN (SELECT content FROM chosen GROUP BY content HAVING count(*) > 1))"
        "  WHERE rank > 1;"
        "DELETE FROM chosen WHERE number IN (FROM rivals)"
    )
    # A row that gives the id that another has by its content is a later state of that one.
    before, rivals = work.row("SELECT (SELECT count(*) FROM chosen), (SELECT count(*) FROM rivals)")
    work.run(
        "DELETE FROM chosen WHERE NOT named AND left(lower(hex(content)), 16) IN"
        "  (SELECT records.id FROM records JOIN chosen USING (number) WHERE chosen.named)"
    )
    (distinct,) = (kept,) = work.row("SELECT count(*) FROM chosen")
    if most_of_a_rater and "rater" in work.columns:
        work.run(
            "DELETE FROM chosen WHERE number IN (SELECT number FROM ("
            "  SELECT number, row_number() OVER (PARTITION BY rater ORDER BY chosen.key, number) AS rank"
            "  FROM chosen JOIN records USING (number) WHERE rater <> '' AND drawn <> 'audit')"
            f"  WHERE rank > {most_of_a_rater})"
        )
        (kept,) = work.row("SELECT count(*) FROM chosen")
    return {
        "duplicate": duplicates + rivals,
        "superseded_by_same_id": superseded + before - distinct,
        "over_max_rows_per_rater": distinct - kept,
    }


def choose_judges(work: Workspace, census: Sequence[Span] = ()) -> None:
    """Put the numbers of the distinct records that may judge into the table `judges`, and why each of a log may.

    A log's answers may judge where they were not chosen by how good they were: an audit drew them, their outcome comes
    whatever was answered, or people judged every answer of their file, as in the spans of `census`.
    """
    if "origin" not in work.columns:
        work.run("CREATE TABLE judges AS SELECT number, '' AS drawn FROM chosen")
        return
    _put_spans(work, "census", census)
    work.run(
        "CREATE TABLE judges AS SELECT number, drawn FROM chosen JOIN records USING (number)"
        "  WHERE origin = '' OR drawn <> '';"
        "INSERT INTO judges SELECT number, 'census' FROM chosen SEMI JOIN census ON number >= start AND number < stop"
        "  WHERE number NOT IN (SELECT number FROM judges)"
    )
    if census:
        work.columns.add("drawn")


def records_that_judge(work: Workspace, numbers: npt.NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
    """The records with these numbers, all in `judges`, in the order of the numbers, each with why it may judge."""
    drawn = dict(work.rows("SELECT number, drawn FROM judges WHERE drawn <> ''"))
    rest = iter(numbers.tolist())
    for batch in work.in_order(numbers, ("id", "prompt", "answer", *WHERE_ANY)):
        reasons = [drawn.get(number, "") for number in islice(rest, len(batch))]
        place = batch.schema.get_field_index("drawn")
        yield batch.set_column(place, "drawn", pa.array(reasons, pa.string()))


def split(
    work: Workspace, data: DataConfig, *, window: list[Span] | None = None, census: Sequence[Span] = (), wanted: int = 1
) -> TrainEvalSplit:
    """Divide the distinct records in `chosen`: held out are those whose hash of what they belong to, their group's name
    or else their own key, is, as a fraction of all hashes, below data.eval_share, if they may judge, as
    `choose_judges` says of `census`. What a log has below it and may not judge is in neither split: an audit may draw
    it later.

    Where data.max_records bounds them, each split keeps those with the smallest hashes. `window`, None for all, are the
    rows whose contents to train on; `wanted` are the records that a gate asks for. Raises DataError: a split is empty,
    or too much is near what is held out.
    """
    eval_share, max_records, replay_share = data.eval_share, data.max_records, data.replay_share
    is_logged = "origin" in work.columns
    choose_judges(work, census)
    work.run(
        f"CREATE TABLE held_out AS FROM chosen SEMI JOIN judges USING (number)"
        f"  WHERE position < '{eval_share!r}'::DOUBLE;"
        "CREATE TABLE others AS FROM chosen ANTI JOIN held_out USING (turns)"
        f"  WHERE position >= '{eval_share!r}'::DOUBLE"
    )
    beside_eval = reserved = 0
    if is_logged:  # a session lies on one side as a whole, whoever rated its answers
        work.run(
            "CREATE TABLE reserved AS SELECT number FROM chosen ANTI JOIN judges USING (number)"
            f"  WHERE position < '{eval_share!r}'::DOUBLE;"
            "CREATE TABLE beside AS FROM reserved"
            "  UNION SELECT number FROM others JOIN records USING (number) WHERE session IN"
            "    (SELECT session FROM records JOIN held_out USING (number) WHERE session <> '');"
            "DELETE FROM others WHERE number IN (FROM beside)"
        )
        beside_eval, reserved = work.row("SELECT (SELECT count(*) FROM beside), (SELECT count(*) FROM reserved)")
    (total, num_held_out, num_others) = work.row(
        "SELECT (SELECT count(*) FROM chosen), (SELECT count(*) FROM held_out), (SELECT count(*) FROM others)"
    )
    enough = None if window is not None or not max_records else _most_train(max_records, num_held_out, eval_share)
    unlike = _unlike(work, similarity=data.near_duplicates, enough=enough)
    _require_few(unlike, max_reject_share=data.max_reject_share, similarity=data.near_duplicates)
    is_apart = data.replay_from == "production"
    before_window, num_earlier = narrow(work, window, replay_share=replay_share, apart=is_apart)
    (num_kept,) = work.row("SELECT count(*) FROM others")
    num_train, num_eval = _sizes(num_kept, num_held_out, eval_share=eval_share, max_records=max_records)
    if not num_eval and reserved:
        raise DataError(f"nothing of the log may judge: {no_judges_text(reserved, data, wanted)}")
    if not num_train or not num_eval:
        limited = f" and data.max_records = {max_records}" if max_records else ""
        remedy = "raise data.eval_share" if not num_eval else "lower data.eval_share"
        raise DataError(
            f"{total} distinct records are too few: with data.eval_share = {eval_share:g}{limited}, "
            f"{num_train} are in train and {num_eval} in eval, and neither may be empty. Add records or {remedy}"
            f"{', or raise data.max_records' if max_records else ''}."
        )
    num_replayed = num_earlier
    if is_apart:
        num_replayed = min(num_replayed, round(num_train * replay_share / (1 - replay_share)))
    beyond = num_kept - num_train + num_held_out - num_eval + num_earlier - num_replayed + unlike.unread
    return TrainEvalSplit(
        parts=_written(work, num_train, num_eval, num_replayed if is_apart else None),
        dropped={
            "own_words_or_session_beside_eval": beside_eval,
            "prompt_in_eval": total - num_held_out - num_others - beside_eval,
            "near_duplicate_of_eval": unlike.left_out,
            "before_window": before_window,
            "over_max_records": beyond,
        },
        replayed=num_replayed,
        reserved=reserved,
        near_duplicates={
            "left_out_share": round(unlike.share, 6),
            "most_are_near": [{"begins": words, "records": count} for words, count in unlike.clusters],
            "in_train": unlike.repeats(num_train),
        },
    )


def _written(work: Workspace, num_train: int, num_eval: int, num_apart: int | None) -> Parts:
    """Write the first records of each split, as many as given; `num_apart` None writes no split `replay`."""

    def first(table: str, count: int) -> Iterator[pa.RecordBatch]:
        numbers = work.numbers(f"SELECT number FROM {table} {_IN_ORDER} LIMIT {count}")
        return work.in_order(numbers, ("id", "prompt", "answer", *WHERE_ANY))

    replay = None if num_apart is None else first("replayed", num_apart)
    held_out = work.numbers(f"SELECT number FROM held_out {_IN_ORDER} LIMIT {num_eval}")
    return write_splits(
        work.folder, first("others", num_train), records_that_judge(work, held_out), replay, columns=work.columns
    )


def no_judges_text(reserved: int, data: DataConfig, wanted: int) -> str:
    """What is missing where `reserved` logged answers may not judge, and how to get it; `wanted` records would do."""
    labels = labels_for(wanted, validation_share=data.validation_share)
    return (
        f"{reserved:,} logged answers are kept apart for it, but people chose them by how good they were, as ratings "
        f"and edits do, or nobody judged them. `fineloop data audit {labels} -c CONFIG` draws {labels} by a hash, for "
        "you to label; outcomes judge too, and with data.whole_log = true a log of which every answer is rated, edited "
        "or labelled"
    )


class _Unlike(NamedTuple):
    """The result of the comparison with the held-out records."""

    looked_at: int
    left_out: int = 0
    unread: int = 0
    clusters: tuple[tuple[str, int], ...] = ()
    repeats: Callable[[int], int] = lambda num_train: 0
    """How many of the first so many records to train on are near an earlier one."""

    @property
    def share(self) -> float:
        return self.left_out / max(1, self.looked_at)


def _unlike(work: Workspace, *, similarity: float, enough: int | None) -> _Unlike:
    """Leave out near records, in order, until `enough` are kept, then all others; `enough` None compares all."""
    counts = work.row("SELECT (SELECT count(*) FROM others), (SELECT count(*) FROM held_out)")
    if not similarity or not all(counts):
        return _Unlike(counts[0])
    numbers, prompts = _prompts(work, "others")
    _, held_out = _prompts(work, "held_out")
    comparison = Comparison(prompts, held_out, similarity=similarity, folder=work.folder)
    is_kept = np.zeros(len(numbers), bool)
    num_kept = looked_at = 0
    near: Counter[int] = Counter()
    for row in comparison.near_held_out(prompts):
        is_kept[looked_at] = row is None
        looked_at += 1
        if row is None:
            num_kept += 1
        else:
            near[row] += 1
        if num_kept == enough:
            break
    work.put("left_out", number=pa.array(numbers[~is_kept]))
    work.run("DELETE FROM others WHERE number IN (FROM left_out)")
    begins: Counter[str] = Counter()
    for row, count in near.items():
        begins[" ".join(held_out[row].split()[:WORDS_SHOWN])[:CHARS_SHOWN]] += count

    def repeats(num_train: int) -> int:
        kept = work.numbers(f"SELECT number FROM others {_IN_ORDER} LIMIT {num_train}")
        return comparison.repeats(prompts, np.isin(numbers, kept))

    clusters = tuple(begins.most_common(CLUSTERS_SHOWN))
    return _Unlike(looked_at, looked_at - num_kept, len(numbers) - looked_at, clusters, repeats)


def _prompts(work: Workspace, table: str) -> tuple[npt.NDArray[np.int64], Texts]:
    """The numbers of a table's records, and their prompts, in order."""
    numbers = work.numbers(f"SELECT number FROM {table} {_IN_ORDER}")
    batches = work.in_order(numbers, ("prompt",))
    return numbers, Texts(Path(work.folder, f"{table}.txt"), map(prompt_texts, batches))


def _require_few(unlike: _Unlike, *, max_reject_share: float, similarity: float) -> None:
    if unlike.share <= max_reject_share:
        return
    lines = "".join(f"\n  {count} x near {words!r}" for words, count in unlike.clusters)
    raise DataError(
        f"{unlike.share:.1%} of what would be trained on is near what is held out ({unlike.left_out} of "
        f"{unlike.looked_at} records), more than data.max_reject_share = {max_reject_share:g} "
        f"allows:{lines}\n"
        "Where such records belong together, as questions on one document do, name the column that says so in "
        f"data.group. Where they do not, raise data.near_duplicates, which is {similarity:g}; 0 compares none. "
        f"data.max_reject_share={math.ceil(100 * unlike.share) / 100:g} trains without them."
    )


def _sizes(num_train: int, num_eval: int, *, eval_share: float, max_records: int) -> tuple[int, int]:
    """How many records of each split to keep; where one has too few for its share, the other makes up for it."""
    if not max_records or num_train + num_eval <= max_records:
        return num_train, num_eval
    kept_train = min(num_train, _most_train(max_records, num_eval, eval_share))
    return kept_train, min(num_eval, max_records - kept_train)


def _most_train(max_records: int, num_eval: int, eval_share: float) -> int:
    """How many of `max_records` go to train, if it has that many."""
    return max_records - min(num_eval, max(1, round(max_records * eval_share)))


# The held-out records: those that choose the weights, and those that judge them.


def validation_and_test(records: Sequence[Record], *, validation_share: float) -> tuple[list[Record], list[Record]]:
    """The records that a checkpoint is chosen on (validation), and those that the gate decides on (test).

    A hash of the record's id, or of its group's name, decides, so that no refresh moves a record to the other side.
    Where there are so few records that either side would be empty, both hold all of them.
    """
    validation = [record for record in records if is_validation(record, validation_share)]
    test = [record for record in records if not is_validation(record, validation_share)]
    return (validation, test) if validation and test else (list(records), list(records))


def is_validation(record: Record, validation_share: float) -> bool:
    """Whether `validation_and_test` puts the record on the validation side, where neither side is empty."""
    belongs_to = f"group:{record.group}" if record.group else record.id
    return position(hashlib.sha256(f"validation:{belongs_to}".encode()).digest()) < validation_share


SAMPLED = 16
"""Number of a test set's records by which it is recognised later."""


@dataclass(frozen=True)
class Judges:
    """The records that judge a run, in the order of their key's hash."""

    records: list[Record]

    def num_independent(self, most: int) -> int:
        """The number of groups among the first `most` records, as the gate counts; of records if none has a group."""
        used = self.records[:most]
        return len(set(groups_of(used))) if any(record.group for record in used) else len(used)

    @property
    def sample(self) -> tuple[str, ...]:
        """The smallest short hashes of the records' ids. A refresh, or using another number of records, changes few."""
        hashes = (hashlib.sha256(record.id.encode()).hexdigest()[:12] for record in self.records)
        return tuple(sorted(hashes)[:SAMPLED])


def judges(store: Store, dataset_uri: str, config: RunConfig) -> Judges:
    """The records that judge a run."""
    return judges_of(load_split(store, dataset_uri, "eval"), config)


def judges_of(held_out: Sequence[Record], config: RunConfig) -> Judges:
    """The held-out records that no training looks at, but for those that earlier releases held out of a log although
    people chose them by how good they were."""
    fit = [record for record in held_out if record.may_judge]
    return Judges(validation_and_test(fit, validation_share=config.data.validation_share)[1])


def lacking(judging: Judges, config: RunConfig, *, reserved: int = 0) -> str:
    """A sentence that says how many records the gate lacks, and what to do; empty where they are enough. A run that
    lacks some would be trained and then held, whatever comes out. `reserved` are the held-out answers of a log that may
    not judge."""
    wanted = config.gate.min_records
    left = judging.num_independent(max(config.evaluate.records, config.evaluate.max_records))
    if left >= wanted:
        return ""
    has_groups = any(record.group for record in judging.records)
    groups = "groups" if config.data.group else "sessions"
    kind = f"{groups} of records" if has_groups else "records"
    if reserved:
        return (
            f"{left} {kind} are left for the gate to decide on, and gate.min_records asks for {wanted}, so that this "
            f"run is refused: {no_judges_text(reserved, config.data, wanted - left)}"
        )
    raised = "evaluate.records" if judging.num_independent(len(judging.records)) >= wanted else "data.eval_share"
    return (
        f"{left} {kind} are left for the gate to decide on, and gate.min_records asks for {wanted}, so that this run "
        f"is refused: raise {raised}, add data or lower gate.min_records"
    )
