"""The held-out records that a run is judged by: those that no training looks at, or the part whose turn it is."""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from components.config.schema import RunConfig
from components.prepare.dataset import Record, load_split
from components.prepare.held_out import folds, validation_and_test
from components.registry import signing
from components.registry.aliases import read_alias
from components.registry.event_log import events
from components.registry.looks import decided_before, next_part
from components.shared.errors import DataError, IntegrityError
from components.shared.metrics import metric_of
from components.store.store import Store

SAMPLED = 16
"""Number of a test set's records by which it is recognised later."""


@dataclass(frozen=True)
class Judges:
    """The records that judge a run, in the order of their key's hash."""

    records: list[Record]
    fold: int | None = None
    """The number of the part that they are, from 1; None where there is only one part."""

    def num_independent(self, most: int) -> int:
        """The number of groups among the first `most` records, as the gate counts; of records if none has a group."""
        used = self.records[:most]
        return len({record.group for record in used}) if any(record.group for record in used) else len(used)

    @property
    def sample(self) -> tuple[str, ...]:
        """The smallest short hashes of the records' ids. A refresh, or using another number of records, changes few."""
        hashes = (hashlib.sha256(record.id.encode()).hexdigest()[:12] for record in self.records)
        return tuple(sorted(hashes)[:SAMPLED])


def judges(store: Store, dataset_uri: str, config: RunConfig, *, run_id: str) -> Judges:
    """The records that judge this run, chosen by the decisions so far.

    Raises:
        DataError: a part is empty.
    """
    parts = parts_of(load_split(store, dataset_uri, "eval"), config)
    if len(parts) == 1:
        return parts[0]
    log, adapter = events(store, config.adapter.name), config.adapter
    counts = partial(signing.counts, store, adapter.name)
    before = [decided_before(log, adapter.alias, each.sample, run_id=run_id, counts=counts) for each in parts]
    decided = [len(each) for each in before]
    return parts[next_part(decided, enough=config.evaluate.decisions_per_fold)]


def parts_of(held_out: Sequence[Record], config: RunConfig) -> list[Judges]:
    """The held-out records that no training looks at, in `evaluate.folds` parts that judge in turn.

    Raises:
        DataError: a part is empty.
    """
    _, records = validation_and_test(held_out, validation_share=config.data.validation_share)
    number = config.evaluate.folds
    if number == 1:
        return [Judges(records)]
    parts = [Judges(part, fold) for fold, part in enumerate(folds(records, number=number), start=1)]
    if not all(part.records for part in parts):
        raise DataError(
            f"{len(records)} held-out records are too few for evaluate.folds {number}: lower it, raise data.eval_share "
            "or add records"
        )
    return parts


def require_enough(store: Store, dataset_uri: str, config: RunConfig, *, run_id: str) -> None:
    """Require as many records to judge this run as its gate asks for, unless the config allows fewer.

    Raises:
        DataError: the run would be trained and then held, whatever comes out.
    """
    judging = judges(store, dataset_uri, config, run_id=run_id)
    if config.gate.too_few_records != "hold" and (lack := lacking(judging, config)):
        raise DataError(lack)


def lacking(judging: Judges, config: RunConfig) -> str:
    """A sentence that says how many records the gate lacks, and what to do; empty where they are enough."""
    wanted = config.gate.min_records
    found = judging.num_independent(max(config.evaluate.records, config.evaluate.max_records))
    if found >= wanted:
        return ""
    kind = "groups of records" if config.data.group else "records"
    raised = "evaluate.records" if judging.num_independent(len(judging.records)) >= wanted else "data.eval_share"
    end = "would be held" if config.gate.too_few_records == "hold" else "is refused"
    ways = f"raise {raised}, add data or lower gate.min_records"
    return (
        f"{found} {kind} are left for the gate to decide on, and gate.min_records asks for {wanted}, so that this run "
        f"{end}: {ways}{'' if end == 'would be held' else '; gate.too_few_records=hold trains all the same'}"
    )


def too_few_to_replace(store: Store, dataset_uri: str, config: RunConfig, *, run_id: str) -> str:
    """A warning that so few records judge this run that no candidate can replace the version that the alias points to;
    empty where one may replace it, or where that depends on how good the version is."""
    gate, adapter = config.gate, config.adapter
    held = None
    with contextlib.suppress(IntegrityError):  # whoever needs it says so
        held = read_alias(store, adapter.name, adapter.alias)
    if held is None or gate.margins == "relative" or metric_of(gate.metric).column != metric_of("loss").column:
        return ""
    wanted = gate.records_to_replace()
    judging = judges(store, dataset_uri, config, run_id=run_id)
    found = judging.num_independent(max(config.evaluate.records, config.evaluate.max_records))
    if found >= wanted:
        return ""
    kind = "groups of records" if config.data.group else "records"
    return (
        f"{found} {kind} judge this run, and only {wanted} of equal length would show a rare large loss: whatever it "
        f"trains, the gate cannot tell whether it may replace {held.version}. Raise data.eval_share or "
        "evaluate.max_records, add data, "
        "allow more with gate.worse_than_champion_by, or set gate.much_worse_share=1"
    )
