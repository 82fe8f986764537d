"""Finds the records of data.source that neither of two versions has seen, and that no look at them has counted."""

from itertools import chain

import numpy as np
import pyarrow as pa

from components.prepare import dataset
from components.prepare.dataset import FORMAT, read_split
from components.prepare.prepare import in_census, opened, read_distinct, within_memory
from components.prepare.sources import find_sources
from components.prepare.split import choose_judges, records_that_judge
from components.prepare.validate import keyed
from components.records import runs
from components.registry import between_runs, looks
from components.registry.between_runs import Consumed
from components.registry.versions import ancestors, resolve
from components.shared.protocol import counted
from components.step.step import StepRun
from components.store.folders import now
from components.store.store import Store

FEWEST = 2
"""An answer is also scored after another record's prompt."""


def publish_newer(step_run: StepRun) -> str:
    """Publish the new records as the split `eval` of a dataset, evaluate.max_records at most, and return its URI; an
    empty text where there are none. What is left of them is new to the next look.

    Raises:
        UserError: there is nothing in production, or nothing of that name to compare it with.
        FineloopError: as `prepare` raises for the data.
        ObjectMissing: what a version was trained on is gone, so that it is not known which records are new.
    """
    config, store, as_of = step_run.config, step_run.store, now()
    compared, _ = looks.compared(store, config)
    step_run.result.update(compared=compared)
    seen, groups = _seen_by(store, config.adapter.name, [compared.version, compared.against])
    for evaluation in looks.earlier(store, config.adapter.name, compared, run_id=step_run.run_id):
        seen.append(_noted(store, evaluation.run_id))
    run_id = resolve(store, f"{config.adapter.name}@{compared.version}").run_id
    read_before = runs.find(store, run_id, Consumed) if run_id else None
    sources = find_sources(config.data.source, seen=read_before.sources if read_before else ())
    with within_memory(), opened(config) as work:
        read = read_distinct(config, sources, work, between_runs.erased(store))
        work.put("trained", belongs_to=pa.array(sorted(groups), pa.string()))
        choose_judges(work, in_census(read, whole_log=config.data.whole_log))
        query = (
            "SELECT number, chosen.content FROM chosen JOIN records USING (number) SEMI JOIN judges USING (number)"
            """ WHERE "group" = '' OR "group" NOT IN (FROM trained) ORDER BY chosen.place, chosen.key, chosen.content"""
        )
        placed = work.rows(query)
        ids = np.array([int.from_bytes(content[: between_runs.ID_BYTES]) for _, content in placed], np.uint64)
        is_new = ~np.isin(ids, np.concatenate([seen_ids.to_numpy() for seen_ids in seen]))
        unseen = [one for one, came_since in zip(placed, is_new, strict=True) if came_since]
        if (total := len(unseen)) < FEWEST:
            audited = ""
            if read.total.logged:
                audited = "; of a log only what an audit drew, or an outcome decides: fineloop data audit"
            step_run.say(f"{counted(total, 'record')} came since: too few to compare on{audited}")
            return ""
        unseen = unseen[: max(config.evaluate.records, config.evaluate.max_records)]
        contents = between_runs.content_ids([content for _, content in unseen])
        numbers = np.array([number for number, _ in unseen], np.int64)
        new = pa.Table.from_batches(records_that_judge(work, numbers))
        parts = dataset.write_splits(work.folder, [], new.to_batches(), columns=work.columns)
        about = {"format": FORMAT, "newer_than": compared._asdict()}
        folder = dataset.publish_dataset(
            store, parts, rejects=work.rejects, rejected=read.total.rejected, profile=about
        )
    fingerprints = {source.name: source.fingerprint for source in sources}
    between_runs.note_consumed(store, step_run.run_id, as_of=as_of, sources=fingerprints, contents=contents)
    left = f"; {total - len(new)} more are left for later looks" if total > len(new) else ""
    step_run.say(f"{counted(len(new), 'record')} that neither {compared.version} nor {compared.against} has seen{left}")
    step_run.result.update(dataset_id=folder.dataset_id, new_records=len(new))
    return folder.uri


def _seen_by(store: Store, name: str, compared: list[str]) -> tuple[list[pa.UInt64Array], set[str]]:
    """The ids of the contents that went into the versions and those that they grew from, and their groups.

    The datasets count, which the signed lineages name, and what the runs noted beside them, such as records that were
    left out: the note lies where a training may write.
    """
    seen, groups = [between_runs.content_ids([])], set[str]()
    lineages = [ancestors(store, resolve(store, f"{name}@{version}")) for version in compared if version != looks.BASE]
    for version, made_from in {one.uri: (one, made) for lineage in lineages for one, made in lineage}.values():
        seen.append(_noted(store, version.run_id))
        for uri in [store.uri(f"datasets/{ancestor.name}") for ancestor in made_from if ancestor.kind == "dataset"]:
            for records in chain(read_split(store, uri, "train"), read_split(store, uri, "eval")):
                groups.update(record.group for record in records)
                seen.append(between_runs.content_ids(keyed(records)["content"].to_pylist()))
    return seen, groups


def _noted(store: Store, run_id: str) -> pa.UInt64Array:
    consumed = runs.find(store, run_id, Consumed) if run_id else None
    return between_runs.consumed_contents(store, consumed) if consumed else between_runs.content_ids([])
