"""The prepare step: `data.source` in, `datasets/<dataset_id>/` out, unless there is too little new to train on."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.config.schema import RunConfig
from components.prepare import intake, news, parts, workspace
from components.prepare.profile import build_profile
from components.prepare.shapes import unread_text
from components.prepare.sources import Source, find_sources
from components.prepare.split import (
    Deduplicated,
    TrainEvalSplit,
    deduplicate,
    require_enough,
    split,
    too_few_to_replace,
)
from components.prepare.validation import Reader, Rules, read_here
from components.prepare.workspace import Workspace
from components.records import runs
from components.records.steps import Decision
from components.registry import between_runs
from components.registry.between_runs import NONE_ERASED, Erased
from components.shared import memory
from components.shared.durations import counted
from components.shared.errors import DataError
from components.shared.metrics import never_trained_text
from components.step.step import StepRun

if TYPE_CHECKING:
    from components.registry.between_runs import Consumed
    from components.store.store import Store

logger = logging.getLogger(__name__)

REASONS_SHOWN = 3
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

    @property
    def summary(self) -> str:
        """One line for people."""
        kept = f"{counted(self.train_records, 'record')} to train on, {self.eval_records} held out"
        if self.replay_records:
            kept += f", {self.replay_records} earlier ones for production to answer"
        reasons = [f"{count:,} {reason}" for reason, count in self.left_out.items() if count]
        left_out = f"; left out: {', '.join(reasons)}" if reasons else ""
        alike = f"; {self.near_in_train:,} of those to train on are near another" if self.near_in_train else ""
        return kept + left_out + alike + (f"; {never_trained_text(self.never_trained)}" if self.never_trained else "")


@contextlib.contextmanager
def _in_memory() -> Iterator[None]:
    """Keep the work in this context within the free memory.

    Raises:
        DataError: it needs more, or there is too little to begin with.
    """
    room = int(MEMORY_SHARE * memory.available_bytes())
    if room < LEAST_ROOM:
        raise DataError(
            f"{room / 2**30:.1f} GiB of memory are free for the records of data.source, and to read any takes "
            f"{LEAST_ROOM / 2**30:.1f} GiB: end other programs, or prepare them where there is more memory"
        )
    try:
        with memory.at_most(room):
            yield
    except MemoryError as exc:
        raise DataError(
            f"the records of data.source do not fit into the {room / 2**30:.1f} GiB of memory that are free for them: "
            "name fewer or smaller files, or prepare them where there is more memory"
        ) from exc


def prepare(config: RunConfig, store: "Store", *, reader: Reader = read_here) -> PreparedDataset:
    """Read, validate, deduplicate, split and publish the run's data. Running it again on the same data writes nothing.
    The dataset is the same with every reader.

    Raises:
        DataError: the data is missing, malformed beyond data.max_reject_share, or too little to split.
        StoreError: an s3:// source or the registry cannot be reached.
    """
    with _in_memory(), _opened(config) as work:
        sources = find_sources(config.data.source)
        return _publish(config, store, work, *_read(config, sources, work, between_runs.erased(store), reader))


@contextlib.contextmanager
def preview(config: RunConfig, sources: Sequence[Source]) -> Iterator[tuple[dict[str, Any], TrainEvalSplit]]:
    """Yield what `prepare` would publish: the profile, and the records to train on and to hold out, which can be read
    until the context ends. Nothing is published.

    It reads no store, and so does not know which records were erased.

    Raises:
        DataError: as for `prepare`.
    """
    with _opened(config) as work:
        with _in_memory():
            read, unique = _read(config, sources, work)
            found = _split(config, work, read)
            profile = build_profile(work, read, unique, found)
        yield profile, found


def prepare_if_new(
    step_run: StepRun, *, is_decided: bool = False, reader: Reader = read_here
) -> PreparedDataset | None:
    """Prepare a run's data, or return None and record a decision to skip when fewer than data.min_new_records are new.

    The sources and contents that the run read are noted for the watermark. If all sources are known, none is opened.
    `is_decided` says that a gate decides at the end of the run: as many records as it asks for have to be held out.

    Raises:
        FineloopError: as for `prepare`.
    """
    from components.registry import between_runs
    from components.store import folders

    minimum, as_of = step_run.config.data.min_new_records, folders.now()
    consumed = between_runs.read_watermark(step_run.store, step_run.config.adapter.name)
    if consumed is not None and consumed.run_id == step_run.run_id:
        consumed = None  # this very run has ended before: a repetition has nothing new, and should give the same result
    sources = find_sources(step_run.config.data.source)
    if minimum and consumed and not news.new_sources(sources, consumed):
        what = sources[0].name if len(sources) == 1 else f"all {len(sources)} sources"
        _skip(step_run, consumed, f"nothing new since run {consumed.run_id}, which read {what}")
        return None
    with _in_memory(), _opened(step_run.config) as work:
        read, unique = _read(step_run.config, sources, work, between_runs.erased(step_run.store), reader)
        contents = between_runs.content_ids(news.contents(work))
        num_new = (
            news.count_new(contents, between_runs.consumed_contents(step_run.store, consumed))
            if consumed
            else len(contents)
        )
        step_run.result.update(new_records=num_new)
        if consumed and num_new < minimum:
            few = f"{_are_new(num_new)} since run {consumed.run_id}, fewer than data.min_new_records = {minimum}"
            _skip(step_run, consumed, few)
            return None
        prepared = _publish(step_run.config, step_run.store, work, read, unique)
        if is_decided:
            require_enough(step_run.store, prepared.uri, step_run.config, run_id=step_run.run_id)
            if line := too_few_to_replace(step_run.store, prepared.uri, step_run.config, run_id=step_run.run_id):
                step_run.say(line)
    fingerprints = {source.name: source.fingerprint for source in sources}
    between_runs.note_consumed(step_run.store, step_run.run_id, as_of=as_of, sources=fingerprints, contents=contents)
    step_run.result.update(vars(prepared))
    since = f"; {_are_new(num_new)} since run {consumed.run_id}" if consumed else ""
    step_run.say(prepared.summary + since)
    return prepared


def _opened(config: RunConfig) -> contextlib.AbstractContextManager[Workspace]:
    return workspace.opened(memory_bytes=round(config.data.memory_gib * 2**30))


def _read(
    config: RunConfig,
    sources: Sequence[Source],
    work: Workspace,
    erased: Erased = NONE_ERASED,
    reader: Reader = read_here,
) -> tuple[intake.Intake, Deduplicated]:
    read = intake.read(sources, work.accept, work.reject, rules=Rules.of(config.data, erased), reader=reader)
    intake.require_usable(read, max_reject_share=config.data.max_reject_share, columns=config.data.columns)
    if read.unread:
        logger.info("%s", unread_text(read.unread, read.columns, config.data.columns))
    work.finish()
    return read, deduplicate(work)


def _split(config: RunConfig, work: Workspace, read: intake.Intake) -> TrainEvalSplit:
    data = config.data
    return split(
        work,
        eval_share=data.eval_share,
        max_records=data.max_records,
        near_duplicates=data.near_duplicates,
        max_near_share=data.max_near_share,
        window=news.in_window(read, days=data.window_days) if data.window_days else None,
        replay_share=data.replay_share,
        replay_apart=data.replay_from == "production",
    )


def _publish(
    config: RunConfig, store: "Store", work: Workspace, read: intake.Intake, unique: Deduplicated
) -> PreparedDataset:
    found = _split(config, work, read)
    profile = build_profile(work, read, unique, found)
    folder = parts.publish(store, found.parts, rejects=work.rejects, rejected=read.rejected, profile=profile)
    prepared = PreparedDataset(
        dataset_id=folder.dataset_id,
        uri=folder.uri,
        train_records=len(found.train),
        eval_records=len(found.evaluation),
        replay_records=len(found.parts.replay or ()),
        rejected=read.rejected,
        left_out=_left_out(read, unique, found),
        near_in_train=found.near_in_train,
        never_trained=profile["never_trained"],
        created=folder.created,
    )
    logger.info("%s %s", "published" if folder.created else "already there:", folder.uri)
    return prepared


def _left_out(read: intake.Intake, unique: Deduplicated, found: TrainEvalSplit) -> dict[str, int]:
    unusable = {f"unusable ({reason})": count for reason, count, _ in read.reasons.most_common()[:REASONS_SHOWN]}
    others = read.rejected - sum(unusable.values())
    return {
        **unusable,
        "unusable for other reasons": others,
        "erased": read.erased,
        "with personal data": read.withheld,
        "repeated": unique.duplicates,
        "replaced by a later row of their id": unique.superseded,
        "with a held-out prompt": found.prompt_in_eval,
        "near what is held out": found.near_duplicate_of_eval,
        "before the window": found.before_window,
        "beyond data.max_records": found.over_max_records,
    }


def _skip(step_run: StepRun, consumed: "Consumed", reason: str) -> None:
    adapter = step_run.config.adapter
    decision = Decision(
        decision="skipped",
        adapter=adapter.name,
        alias=adapter.alias,
        reasons=(reason,),
        run_id=step_run.run_id,
        since_run=consumed.run_id,
    )
    runs.write(step_run.store, step_run.run_id, decision)
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
    given = {
        name: f"{KEYS[name]}={json.dumps(value, ensure_ascii=False)}" for name, value in parameters.items() if value
    }
    if train_without_new_data:
        given[ANYWAY] = "data.min_new_records=0"
    return given
