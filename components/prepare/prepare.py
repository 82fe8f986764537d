"""The prepare step: `data.source` in, `datasets/<dataset_id>/` out, unless there is too little new to train on."""

import contextlib
import json
import logging
import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from components.config.schema import RunConfig
from components.config.train import ColumnsConfig
from components.prepare import dataset, icd10, workspace
from components.prepare.dataset import FORMAT, Part, Parts, Reject
from components.prepare.feedback import Feedback, read_feedback, sources_of_feedback
from components.prepare.power import power
from components.prepare.rows import SAVE_AS_UTF_8, form_of
from components.prepare.shapes import EXPECTED, TRACES, advice, recognised, unread_text
from components.prepare.sources import Source, find_sources
from components.prepare.split import Span, TrainEvalSplit, deduplicate, judges, lacking, split
from components.prepare.validate import Counts, Reader, Rules, read_here
from components.prepare.workspace import Workspace, quoted
from components.records.steps import left_out_text
from components.registry import between_runs
from components.registry.between_runs import NONE_ERASED, Consumed, Erased
from components.shared import machine
from components.shared.errors import DataError
from components.shared.metrics import are_labels, never_trained_text
from components.shared.protocol import counted
from components.step.step import StepRun
from components.store import folders
from components.store.store import Store

logger = logging.getLogger(__name__)

_MAX_NAMES_SHOWN, REASONS_SHOWN = 20, 3
NO_RULES = Rules()


@dataclass
class Intake:
    """What was read, counted."""

    sources: list[tuple[Source, Counts]] = field(default_factory=list)
    """In order, with what each gave."""
    total: Counts = field(default_factory=Counts)
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejected rows by the kind of reason."""
    examples: dict[str, Reject] = field(default_factory=dict)
    """The first row of each kind of reason."""
    columns: Counter[str] = field(default_factory=Counter)
    """Rows that have each column."""
    unread: Counter[str] = field(default_factory=Counter)
    """Rows in a shape that we know, of which nothing is read from this column, or from this key of a message."""
    shapes: Counter[str] = field(default_factory=Counter)
    """Rows whose columns are those of a record, whatever they hold, by their shape."""
    feedback: Feedback = field(default_factory=Feedback)
    repeated: dict[str, int] = field(default_factory=dict)
    """Usable records beside the distinct ones, by why."""

    @property
    def rejected_share(self) -> float:
        return self.total.rejected / self.total.rows if self.total.rows else 0.0

    def most_common(self) -> list[tuple[str, int, Reject]]:
        """Most frequent first: the kind of reason, or the only reason of its kind, its count, its first row."""
        return [
            (self.examples[kind].reason if count == 1 else kind, count, self.examples[kind])
            for kind, count in self.reasons.most_common()
        ]


def read_sources(
    sources: Sequence[Source],
    accept: Callable[[pa.RecordBatch], None],
    reject: Callable[[Reject], None],
    *,
    rules: Rules = NO_RULES,
    reader: Reader = read_here,
) -> Intake:
    """Validate every row of every source. What was erased is only counted.

    Records are handed over a batch at a time, as `keyed_batch` has them, and rejects as they come. Raises DataError: a
    source cannot be opened; StoreError: an s3:// source cannot be read.
    """
    intake = Intake([(source, Counts()) for source in sources])
    for place, (batch, rejects, counts) in reader(sources, rules):
        accept(batch)
        for rejected_row in rejects:
            # Without its positions, so that like reasons count together.
            kind = re.sub(r"\b(byte|column) \d+", r"\1 N", re.sub(r"\[\d+\]", "[N]", rejected_row.reason))
            intake.reasons[kind] += 1
            intake.examples.setdefault(kind, rejected_row)
            reject(rejected_row)
        intake.total.add(counts)
        intake.sources[place][1].add(counts)
    intake.unread.update(intake.total.unread)
    for source, counts in intake.sources:
        logger.info("%s: %s, %s unusable", source.name, counted(counts.rows, "row"), f"{counts.rejected:,}")
    for names, count in intake.total.columns.items():
        for column in names:
            intake.columns[column] += count
        if shape := recognised(names, rules.data.columns):
            intake.shapes[shape.name] += count
            read = rules.columns_read(names)
            intake.unread.update({column: count for column in names if column not in read})
    return intake


def require_usable(intake: Intake, *, max_reject_share: float, columns: ColumnsConfig | None = None) -> None:
    """Stop on data that should not be trained on; `columns` is data.columns, as for `read_sources`. Raises DataError:
    no rows, none with the columns of a record, none usable, or too many unusable."""
    names = _listed([source.name for source, _ in intake.sources])
    total = intake.total
    if not total.rows:
        raise DataError(f"data.source has no rows: {names} {'is' if len(intake.sources) == 1 else 'are'} empty")
    if intake.columns and not intake.shapes:
        is_csv = all((form := form_of(source.name)) and form.kind == "csv" for source, _ in intake.sources)
        header = ". Where the first row holds data, write one with the columns' names above it" if is_csv else ""
        raise DataError(
            f"data.source has no row with the expected columns ({names}): "
            f"found {_listed([repr(column) for column, _ in intake.columns.most_common()])}; expected {EXPECTED}. "
            f"{advice(list(intake.columns), columns or ColumnsConfig())}{header}"
        )
    share = intake.rejected_share
    if not total.accepted and total.unused:
        raise DataError(
            f"none of {total.unused.total():,} logged answers is rated good, edited or labelled: name in data.feedback "
            "what people said of them, by response_id or data.feedback_key"
        )
    if intake.feedback.rows and TRACES.name not in intake.shapes:
        raise DataError("data.feedback is on logged answers, and no row of data.source is one: see docs/data.md")
    if not total.accepted:
        raise DataError(f"data.source has no usable row among {total.rows:,}:{_reasons_text(intake)}")
    if share > max_reject_share:
        raise DataError(
            f"{share:.1%} of rows are unusable ({total.rejected:,} of {total.rows:,}), more than "
            f"data.max_reject_share = {max_reject_share:g} allows:{_reasons_text(intake)}\n"
            "Fix these rows or raise data.max_reject_share."
        )
    if total.rejected:
        logger.info("%.2f %% of rows are unusable; data.max_reject_share = %g allows it", 100 * share, max_reject_share)


def _reasons_text(intake: Intake) -> str:
    reasons = intake.most_common()
    lines = [
        f"\n  {count:,} x {reason} (for example {example.source}:{example.line})"
        for reason, count, example in reasons[:REASONS_SHOWN]
    ]
    if hidden := reasons[REASONS_SHOWN:]:
        lines.append(f"\n  {sum(count for _, count, _ in hidden)} x {len(hidden)} other reasons")
    if any(reason.startswith("not UTF-8 at byte") for reason, _, _ in reasons):
        lines.append(f"\n{SAVE_AS_UTF_8}.")
    return "".join(lines)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES_SHOWN])
    hidden = len(names) - _MAX_NAMES_SHOWN
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def in_window(intake: Intake, *, days: float) -> list[Span] | None:
    """The records from the files and objects that were modified in the last `days` before the newest one; None for all.

    The window ends at the newest source, not today, so that a step that is retried tomorrow makes the same dataset.
    A source without a time, such as a file on the hub, is always in it.
    """
    if not days:
        return None
    times = [source.modified_at for source, _ in intake.sources if source.modified_at]
    begin = max(times) - timedelta(days=days) if times else None
    spans, start = [], 0
    for source, counts in intake.sources:
        if begin is None or source.modified_at is None or source.modified_at >= begin:
            spans.append((start, start + counts.accepted))
        start += counts.accepted
    return spans


def in_census(intake: Intake, *, whole_log: bool) -> list[Span]:
    """The records of the files of which people judged every logged answer, where the config says that they hold every
    answer that was given: an export of what drew feedback looks the same."""
    spans, start = list[Span](), 0
    for _, counts in intake.sources:
        if whole_log and counts.logged and not counts.unused:
            spans.append((start, start + counts.accepted))
        start += counts.accepted
    return spans


# The profile of a dataset, for a person to check before trusting it: profile.json.

_TOP_ANSWERS, _SAMPLES, _MAX_SAMPLE_CHARS = 20, 3, 2000


def build_profile(work: Workspace, intake: Intake, split: TrainEvalSplit) -> dict[str, Any]:
    """Build the profile, which accounts for every row: rows read = rejected + dropped + the records of both splits."""
    parts = split.parts
    (begins, *others) = work.rows(f"SELECT DISTINCT prompt[1] FROM {_sql_of(parts.train, parts.evaluation)} LIMIT 2")
    # Whoever asks the adapter should send a system message that every record begins with.
    is_shared = not others and begins[0]["role"] == "system"
    return {
        "format": FORMAT,
        "rows": {
            "read": intake.total.rows,
            "accepted": intake.total.accepted,
            "rejected": intake.total.rejected,
            "rejected_share": round(intake.rejected_share, 6),
        },
        "rejected": [
            {"reason": reason, "rows": count, "example": f"{example.source}:{example.line}"}
            for reason, count, example in intake.most_common()
        ],
        "personal": {"records": intake.total.with_personal, "found": dict(intake.total.personal.most_common())},
        "dropped": {
            "erased": intake.total.erased,
            **intake.total.unused,
            "personal_data": intake.total.withheld,
            **intake.repeated,
            **split.dropped,
        },
        "near_duplicates": split.near_duplicates,
        "system_message": begins[0]["content"] if is_shared else None,
        **({"logged": _logged(work, intake, parts, split.reserved)} if intake.total.logged else {}),
        "shapes": dict(intake.shapes.most_common()),
        "columns": dict(intake.columns.most_common()),
        "extra_columns": dict(intake.unread.most_common()),
        "replayed": split.replayed,
        "never_trained": never_trained(work, parts),
        "splits": {part.name: _describe(work, part) for part in parts.splits},
        "sources": [
            {"source": source.name, "bytes": source.size_bytes, "rows": counts.rows, "rejected": counts.rejected}
            for source, counts in intake.sources
        ],
    }


def _logged(work: Workspace, intake: Intake, parts: Parts, reserved: int) -> dict[str, Any]:
    """What the log and the feedback are made of, and what of it deserves a warning."""
    feedback, uses, served = intake.feedback, Counter[str](), dict[str, dict[str, int]]()
    for (version, use), count in sorted(intake.total.logged.items()):
        uses[use] += count
        served.setdefault(version, {})[use] = count
    origins, warnings, systems = dict[str, dict[str, int]](), list[str](), [list[str](), list[str]()]
    if "origin" in work.columns:
        for part in parts.splits:
            query = f"SELECT origin, count(*) FROM {_sql_of(part)} WHERE origin <> '' GROUP BY 1 ORDER BY 1"
            origins[part.name] = dict(work.rows(query))
        first = "CASE WHEN prompt[1].role = 'system' THEN prompt[1].content ELSE '' END"
        query = f"SELECT DISTINCT {first} FROM {_sql_of(*parts.splits)} WHERE origin"
        systems = [[text for (text,) in work.rows(f"{query} {what}")] for what in ("<> ''", "= ''")]
    if all(systems) and set(systems[0]).isdisjoint(systems[1]):
        of_log, of_others = (max(texts, key=len)[:80] for texts in systems)
        warnings.append(
            f"logged requests begin with another system message, {of_log!r}, than the other records, {of_others!r}: "
            "the adapter is asked with the gateway's"
        )
    judge = dict[str, int]()
    if "drawn" in work.columns:
        evaluation = _sql_of(parts.evaluation)
        judge = dict(work.rows(f"SELECT drawn, count(*) FROM {evaluation} WHERE drawn <> '' GROUP BY 1 ORDER BY 1"))
        by_rater = work.rows(
            f"SELECT count(*) FROM {evaluation} WHERE drawn <> '' GROUP BY rater ORDER BY 1 DESC LIMIT 1"
        )
        if by_rater and 2 * by_rater[0][0] > (total := sum(judge.values())) and total > judge.get("outcome", 0):
            warnings.append(
                f"one rater says what is right on {by_rater[0][0]:,} of the {total:,} logged answers that judge: what "
                "he takes for right decides. Have somebody else label a part"
            )
    warnings += [audit.flaw for audit in feedback.audits.values() if audit.flaw]
    if uses["corrected"] > uses["good"]:
        warnings.append(
            f"{uses['corrected']:,} of {uses['corrected'] + uses['good']:,} answers to learn from put one right, while "
            f"{uses['unrated']:,} of {uses.total():,} drew no feedback: what is right today may be forgotten. Keep "
            "earlier data in data.source, or collect what is good too"
        )
    return {
        "origin": origins,
        "served_by": served,
        "judge": judge,
        "reserved": reserved,
        "feedback": {
            "rows": feedback.rows,
            "unusable": dict(feedback.unusable),
            "answers": len(feedback.verdicts),
            "unmatched": len(feedback.verdicts.keys() - intake.total.judged.keys()),
            "raters_differ": sum(verdict.differ for verdict in feedback.verdicts.values()),
        },
        "warnings": warnings,
    }


def never_trained(work: Workspace, parts: Parts) -> dict[str, int]:
    """The number of held-out records of each label that no record to train on has; empty if answers are not labels."""
    (distinct, records) = work.row(
        f"SELECT count(DISTINCT answer), count(*) FROM {_sql_of(parts.train, parts.evaluation)}"
    )
    if not are_labels(distinct, records):
        return {}
    return dict(
        work.rows(
            f"SELECT answer, count(*) FROM {_sql_of(parts.evaluation)} WHERE answer NOT IN"
            f" (SELECT answer FROM {_sql_of(parts.train)}) GROUP BY answer ORDER BY 2 DESC, 1"
        )
    )


def percentiles(lengths: Mapping[int, int]) -> dict[str, int]:
    """Nearest-rank percentiles of at least one length; `lengths` counts each."""
    ordered = sorted(lengths.items())
    ends = list(accumulate(count for _, count in ordered))
    return {
        f"p{rank}": ordered[bisect(ends, round(rank / 100 * (ends[-1] - 1)))][0] for rank in (0, 10, 50, 90, 99, 100)
    }


def _describe(work: Workspace, part: Part) -> dict[str, Any]:
    records, answer = _sql_of(part), "answer"
    if "calls" in work.columns:
        answer = "CASE WHEN answer = '' THEN calls ELSE answer END"
    counted = f"SELECT {answer} AS answer, count(*) AS records, min(file_index * 2**32 + file_row_number) AS first"
    work.run(f"CREATE OR REPLACE TEMP TABLE answers AS {counted} FROM {records} GROUP BY 1")
    (distinct,) = work.row("SELECT count(*) FROM answers")
    top = work.rows(f"SELECT answer, records FROM answers ORDER BY records DESC, first LIMIT {_TOP_ANSWERS}")
    group = """CASE WHEN "group" = '' THEN id ELSE "group" END"""
    groups = work.row(f"SELECT count(DISTINCT {group}) FROM {records}")[0] if "group" in work.columns else None

    def lengths(text: str) -> dict[str, int]:
        return percentiles(dict(work.rows(f"SELECT {text} AS length, count(*) FROM {records} GROUP BY 1")))

    return {
        "records": len(part),
        "groups": groups,
        "prompt_chars": lengths("list_sum([length(turn.content) for turn in prompt])"),
        "answer_chars": lengths(f"length({answer})"),
        "distinct_answers": distinct,
        "most_frequent_answers": [
            {"answer": _cut(text), "records": count, "share": round(count / len(part), 6)} for text, count in top
        ]
        if distinct < len(part)
        else [],
        "samples": [
            {
                "id": record.id,
                "prompt": [{"role": turn.role, "content": _cut(turn.content)} for turn in record.prompt],
                "answer": _cut(record.answer_text),
            }
            for record in part.head(_SAMPLES)
        ],
    }


def _sql_of(*parts: Part) -> str:
    paths = ", ".join(quoted(path) for part in parts for path in part.paths)
    return f"read_parquet([{paths}], file_row_number = true)"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SAMPLE_CHARS else f"{text[:_MAX_SAMPLE_CHARS]}…"


MEMORY_SHARE = 0.8
"""Share of the free memory that may be used: small files may unpack to more than any machine has."""
LEAST_ROOM = 2**29
"""Fewest bytes to work with. With less, a library may fail to start a thread, whose stack counts in full, and exit with
a message of its own."""


@dataclass(frozen=True)
class PreparedDataset:
    """The facts about a dataset that the later steps need."""

    dataset_id: str
    uri: str
    train_records: int
    eval_records: int
    replay_records: int
    """Records beside train, which production is to answer."""
    rejected: int
    """Unusable rows of this run's sources."""
    left_out: dict[str, int]
    """Number of rows of this run's sources that are in neither split, by reason."""
    near_in_train: int
    """Records to train on that hardly differ from another one."""
    never_trained: dict[str, int]
    """Number of held-out records by label, for the labels that no record to train on has."""
    created: bool
    """False when the store already held these records: nothing was written."""
    reserved: int = 0
    """Logged answers on the held-out side that may not judge: an audit may draw them."""
    manifest_sha256: str = ""
    """Covers every file of the dataset, its profile too; empty where a job of an earlier release prepared it."""

    @property
    def summary(self) -> str:
        kept = f"{counted(self.train_records, 'record')} to train on, {self.eval_records} held out"
        if self.replay_records:
            kept += f", {self.replay_records} earlier ones for production to answer"
        reasons = [f"{count:,} {reason}" for reason, count in self.left_out.items() if count]
        left_out = f"; left out: {', '.join(reasons)}" if reasons else ""
        alike = f"; {self.near_in_train:,} of those to train on are near another" if self.near_in_train else ""
        return kept + left_out + alike + (f"; {never_trained_text(self.never_trained)}" if self.never_trained else "")


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """Keep the work in this context within the free memory. Raises DataError: it needs more, or there is too little to
    begin with."""
    room = int(MEMORY_SHARE * machine.available_bytes())
    if room < LEAST_ROOM:
        raise DataError(
            f"{room / 2**30:.1f} GiB of memory are free for the records of data.source, and to read any takes "
            f"{LEAST_ROOM / 2**30:.1f} GiB: end other programs, or prepare them where there is more memory"
        )
    try:
        with machine.at_most(room):
            yield
    except MemoryError as exc:
        raise DataError(
            f"the records of data.source do not fit into the {room / 2**30:.1f} GiB of memory that are free for them: "
            "name fewer or smaller files, or prepare them where there is more memory"
        ) from exc


def prepare(config: RunConfig, store: Store, *, reader: Reader = read_here) -> PreparedDataset:
    """Read, validate, deduplicate, split and publish the run's data. Running it again on the same data writes nothing.
    The dataset is the same with every reader. Raises DataError: the data is missing, malformed beyond
    data.max_reject_share, or too little to split; StoreError: an s3:// source or the registry cannot be reached."""
    with within_memory(), opened(config) as work:
        sources = find_sources(config.data.source)
        return _publish(config, store, work, read_distinct(config, sources, work, between_runs.erased(store), reader))


@contextlib.contextmanager
def preview(config: RunConfig, sources: Sequence[Source]) -> Iterator[tuple[dict[str, Any], Parts]]:
    """Yield what `prepare` would publish: the profile, and the records to train on and to hold out, which can be read
    until the context ends. Nothing is published.

    It reads no store, and so does not know which records were erased. Raises DataError as `prepare`.
    """
    with opened(config) as work:
        with within_memory():
            read = read_distinct(config, sources, work)
            sides = split_read(work, read, config)
            profile = build_profile(work, read, sides)
        yield profile, sides.parts


def prepare_if_new(
    step_run: StepRun, *, is_decided: bool = False, reader: Reader = read_here
) -> PreparedDataset | None:
    """Prepare a run's data, or return None and record a decision to skip when fewer than data.min_new_records are new.

    The sources and contents that the run read are noted for the watermark. If all sources are known, none is opened.
    `is_decided` says that a gate decides at the end of the run: as many records as it asks for have to be held out.
    Raises FineloopError as `prepare`.
    """
    minimum, as_of = step_run.config.data.min_new_records, folders.now()
    consumed = between_runs.read_watermark(step_run.store, step_run.config.adapter.name)
    sources = find_sources(step_run.config.data.source, seen=consumed.sources if consumed else ())
    if consumed is not None and consumed.run_id == step_run.run_id:
        # This very run has ended before: a repetition has nothing new, and should give the same result.
        sources, consumed = [source for source in sources if source.name in consumed.sources], None
    read_from = [*sources, *sources_of_feedback(step_run.config.data)]
    if minimum and consumed and all(consumed.sources.get(source.name) == source.fingerprint for source in read_from):
        what = sources[0].name if len(read_from) == 1 else f"all {len(read_from)} sources"
        _skip(step_run, consumed, f"nothing new since run {consumed.run_id}, which read {what}")
        return None
    arrived = {source.name for source in sources} - (consumed.sources.keys() if consumed else set())
    if any(name.startswith(icd10.ADDRESS) for name in arrived):
        step_run.say(icd10.news([source.name for source in sources]))
    with within_memory(), opened(step_run.config) as work:
        read = read_distinct(step_run.config, sources, work, between_runs.erased(step_run.store), reader)
        batches = work.batches("SELECT content FROM chosen")
        contents = between_runs.content_ids(content for batch in batches for content in batch["content"].to_pylist())
        num_new = len(contents)
        if consumed:
            seen = pc.is_in(contents, value_set=between_runs.consumed_contents(step_run.store, consumed))
            num_new -= pc.sum(seen).as_py() or 0
        step_run.result.update(new_records=num_new)
        if consumed and num_new < minimum:
            few = f"{_are_new(num_new)} since run {consumed.run_id}, fewer than data.min_new_records = {minimum}"
            _skip(step_run, consumed, few)
            return None
        prepared = _publish(step_run.config, step_run.store, work, read)
        if is_decided:
            judging = judges(step_run.store, prepared.uri, step_run.config)
            if lack := lacking(judging, step_run.config, reserved=prepared.reserved):
                raise DataError(lack)
            step_run.result.update(power=power(judging, step_run.config))
            step_run.say(step_run.result["power"]["sentence"])
    fingerprints = {source.name: source.fingerprint for source in read_from}
    between_runs.note_consumed(step_run.store, step_run.run_id, as_of=as_of, sources=fingerprints, contents=contents)
    step_run.result.update(vars(prepared))
    since = f"; {_are_new(num_new)} since run {consumed.run_id}" if consumed else ""
    step_run.say(prepared.summary + since)
    return prepared


def opened(config: RunConfig) -> contextlib.AbstractContextManager[Workspace]:
    """Open a workspace with as much memory as the config gives it."""
    return workspace.opened(memory_bytes=round(config.data.memory_gib * 2**30))


def read_distinct(
    config: RunConfig,
    sources: Sequence[Source],
    work: Workspace,
    erased: Erased = NONE_ERASED,
    reader: Reader = read_here,
) -> Intake:
    """Read, validate and deduplicate the sources: the distinct records are the workspace's table `chosen`. Raises as
    `read_sources` and `require_usable`."""
    feedback = read_feedback(config.data, erased)
    rules = Rules(config.data, (config.adapter.name, config.adapter.alias), feedback.verdicts, erased)
    read = read_sources(sources, work.accept, work.reject, rules=rules, reader=reader)
    read.feedback = feedback
    require_usable(read, max_reject_share=config.data.max_reject_share, columns=config.data.columns)
    if read.unread:
        logger.info("%s", unread_text(read.unread))
    work.finish()
    read.repeated = deduplicate(work, most_of_a_rater=config.data.max_rows_per_rater)
    return read


def split_read(work: Workspace, read: Intake, config: RunConfig) -> TrainEvalSplit:
    """Both sides of what was read; raises as `split`."""
    window = in_window(read, days=config.data.window_days)
    census = in_census(read, whole_log=config.data.whole_log)
    return split(work, config.data, window=window, census=census, wanted=config.gate.min_records)


def _publish(config: RunConfig, store: Store, work: Workspace, read: Intake) -> PreparedDataset:
    sides = split_read(work, read, config)
    profile = build_profile(work, read, sides)
    parts = sides.parts
    folder = dataset.publish_dataset(store, parts, rejects=work.rejects, rejected=read.total.rejected, profile=profile)
    unusable = {f"unusable ({reason})": count for reason, count, _ in read.most_common()[:REASONS_SHOWN]}
    unusable["unusable for other reasons"] = read.total.rejected - sum(unusable.values())
    prepared = PreparedDataset(
        dataset_id=folder.dataset_id,
        uri=folder.uri,
        train_records=len(parts.train),
        eval_records=len(parts.evaluation),
        replay_records=len(parts.replay or ()),
        rejected=read.total.rejected,
        left_out={**unusable, **{left_out_text(name): rows for name, rows in profile["dropped"].items()}},
        near_in_train=sides.near_duplicates["in_train"],
        never_trained=profile["never_trained"],
        created=folder.created,
        reserved=sides.reserved,
        manifest_sha256=folder.manifest_sha256,
    )
    for line in profile.get("logged", {}).get("warnings", ()):
        logger.warning("%s", line)
    logger.info("%s %s", "published" if folder.created else "already there:", folder.uri)
    return prepared


def _skip(step_run: StepRun, consumed: Consumed, reason: str) -> None:
    step_run.record_skip([reason], since_run=consumed.run_id)
    step_run.result.update(skipped=reason)
    step_run.say(f"skipped: {reason}")


def _are_new(number: int) -> str:
    return f"{counted(number, 'record')} {'is' if number == 1 else 'are'} new"


# The pipeline's parameters beside its config: what people change from run to run, each a field in the Kubeflow UI.

KEYS = {
    "adapter_name": "adapter.name",
    "base_model": "model.base",
    "data_source": "data.source",
    "method_name": "method.name",
    "rank": "method.rank",
    "learning_rate": "train.learning_rate",
    "epochs": "train.epochs",
    "num_workers": "ray.num_workers",
}
"""The config key that each parameter replaces. Empty and 0 replace nothing: a pipeline's parameter cannot be absent."""

ANYWAY = "train_without_new_data"


def overrides(*, train_without_new_data: bool = False, **parameters: str | float) -> dict[str, str]:
    """The overrides that the given parameters make, as `section.key=value` by the parameter's name."""
    # Text becomes a quoted TOML string; JSON strings are valid TOML strings.
    changes = {
        name: f"{KEYS[name]}={json.dumps(value, ensure_ascii=False)}" for name, value in parameters.items() if value
    }
    if train_without_new_data:
        changes[ANYWAY] = "data.min_new_records=0"
    return changes
