"""Sweep learning rates, and compare methods at their best: `python -m ray_jobs.sweep --config FILE`.

Ray Tune runs the trials, as many at once as the cluster has workers for. The dataset is prepared and tokenised once. An
interrupted sweep resumes under its run id, without the trials that have ended.
"""

import argparse
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import ray
from ray import tune

from components.config import config_file
from components.config.schema import RunConfig
from components.records import runs
from components.records.sweep import SweepResult, Trial
from components.registry import lineage
from components.shared.errors import JobError
from components.shared.protocol import say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import own_base
from ray_jobs.base import base_model
from ray_jobs.base.base_model import Base
from ray_jobs.planning.capacity import before_training
from ray_jobs.prepare import prepare
from ray_jobs.probes.texts import unread_passages
from ray_jobs.replaying import training_data
from ray_jobs.sweeping import verdict
from ray_jobs.sweeping.plan import Plan, point_of, prior_rate, servable_as, swept_methods, trial_config
from ray_jobs.sweeping.trial import Ledger, as_config, make_base, run, run_trial
from ray_jobs.training import starting, train_loop
from ray_jobs.training.starting import PlannedSplit
from ray_jobs.training.trainer import wait_for_room

STEP = "tune"
tell = functools.partial(say, STEP)


def main() -> None:
    """Run the job of this command line, and exit with its code."""
    parser = entry.parser("ray_jobs.sweep", __doc__)

    def job(config: RunConfig, arguments: argparse.Namespace) -> None:
        run_id = arguments.run_id or entry.new_run_id(config.adapter.name)
        result = sweep(config, run_id=run_id, dataset_uri=arguments.dataset or prepare(config, STEP))
        tell(result.verdict)

    entry.main(STEP, entry.takes_data(parser), job)


def sweep(config: RunConfig, *, run_id: str, dataset_uri: str) -> SweepResult:
    """Run the missing trials of the sweep; the result is also written to runs/<run_id>/sweep.json.

    Raises:
        UserError: config or data cannot work; raised before any trial is started where possible.
        JobError: every trial failed, or training diverged at every rate.
    """
    began = time.monotonic()
    methods = swept_methods(config)
    store = Store.open(config.registry)
    dataset_uri = training_data(config, store, dataset_uri, tell, run_id=run_id)
    to_keep = starting.identity_to_keep(config, store, run_id, tell)
    config, base, _, chat = resolved_base = starting.resolve_base(config, store, tell, recorded=to_keep)
    train_split, validation = starting.read_splits(store, dataset_uri, resolved_base, tell)
    plan = Plan(config, methods, _ended(config, methods, store, run_id, len(train_split)))
    if plan.trials:
        tell(f"going on after {len(plan.trials)} trials that have ended")
    judged = f"judged on {len(validation)} that no trial trains on"
    tell(f"sweeping {', '.join(methods)} on {len(train_split):,} records, {judged}")
    passages = unread_passages(chat, config)
    if plan.compares and len(passages.split):
        tell(
            f"each training that compares methods also reads {len(passages.split)} passages of general text, for what "
            "the method forgets (evaluate.general_passages; 0 reads none and saves the time)"
        )
    entry.connect()
    memory = _planned(config, methods, base, train_split)
    dataset = starting.dataset_record(store, dataset_uri)
    identity = lineage.Base(config.model.base, base.identity)
    resolved = {"run_id": run_id, "dataset": dataset, "base": identity, "pad": chat.pad}
    tokens = {"train_tokens": train_split.stored, "validation_tokens": validation.stored}
    trainable = tune.with_parameters(run_trial, resolved=resolved, **tokens, passages=passages)

    def keep(trial: Trial) -> None:
        runs.write(store, run_id, trial)
        tell(verdict.row(trial))

    tell(verdict.HEADER)
    run(
        tune.with_resources(trainable, config.ray.per_worker),
        plan,
        lambda point: as_config(config, point, len(train_split)),
        Ledger(plan, keep, tell),
        num_steps=config.tune.max_steps or train_loop.num_steps(config.train, len(train_split)),
        storage_path=store.uri(runs.run_key(run_id).rstrip("/")),
    )
    # The base as the trials have read it.
    base = base_model.resolve(config.model, recorded=base.identity, weights=False, registry=store)
    identity = lineage.Base(config.model.base, base.identity)
    result = _result(config, plan, memory, run_id, dataset, identity, len(validation), time.monotonic() - began)
    runs.write(store, run_id, result)
    return result


def _ended(config: RunConfig, methods: Sequence[str], store: Store, run_id: str, num_records: int) -> list[Trial]:
    """Trials of an earlier attempt that this config would repeat identically."""

    def is_alike(trial: Trial) -> bool:
        point = point_of(config, trial.method, trial.learning_rate, trial.seed, compares=trial.compares)
        return trial_config(config, point, num_records).digest == trial.config_digest

    return [trial for trial in runs.trials(store, run_id) if trial.method in methods and is_alike(trial)]


def _planned(config: RunConfig, methods: Sequence[str], base: Base, train_split: PlannedSplit) -> dict[str, int | None]:
    """Planned bytes of one worker for each method. Refuses what cannot fit, and creates the methods' own bases, once
    and on a worker: trials that start together would otherwise each create one."""
    num_records, memory = len(train_split), dict[str, int | None]()
    points = [point_of(config, method, prior_rate(config, method), config.train.seed) for method in methods]
    trials = {point.method: trial_config(config, point, num_records) for point in points}
    for method, trial in trials.items():
        if not memory:
            wait_for_room(trial.ray.cluster, trial.ray.per_worker, 1, tell)
        outlook = before_training(trial, base.path, train_split, ray.nodes())
        memory[method] = outlook.stored_bytes if len(methods) > 1 else None
    for method, trial in trials.items():
        if own_base.is_needed(trial.method):
            tell(f"making the base of {method}, or finding it made")
            resources = trial.ray.per_worker
            make = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(make_base)
            ray.get(make.remote(config_file.dumps(trial)))
    return memory


def _result(
    config: RunConfig,
    plan: Plan,
    memory: Mapping[str, int | None],
    run_id: str,
    dataset: lineage.Dataset,
    base: lineage.Base,
    num_records: int,
    seconds: float,
) -> SweepResult:
    tuned = {method: best for method, planned in memory.items() if (best := plan.tuned(method, planned))}
    if not tuned:
        failed = [trial for trial in plan.trials.values() if trial.status == "failed"]
        if failed:
            first = f"the first, {failed[0].name}: {failed[0].why}"
            raise JobError(f"no trial ended well, and {len(failed)} of {len(plan.trials)} failed; {first}")
        lowest = min((trial.learning_rate for trial in plan.trials.values()), default=math.nan)
        raise JobError(
            f"all {len(plan.trials)} trainings diverged, at rates down to {lowest:.3g}: check the data, or name lower "
            "rates in tune.learning_rates"
        )
    reference = verdict.reference_of([*tuned])
    theirs = plan.seeds_of(reference) if plan.compares else []
    comparisons = []
    for method in [name for name in tuned if plan.compares and name != reference]:
        how = servable_as(config, method)
        if comparison := verdict.compare(tuned[method], plan.seeds_of(method), tuned[reference], theirs, how):
            comparisons.append(comparison)
    best = tuned[verdict.advised(comparisons, reference)]
    trials = sorted(plan.trials.values(), key=lambda trial: (trial.method, trial.learning_rate, trial.seed))
    return SweepResult(
        run_id=run_id,
        adapter=config.adapter.name,
        base={"reference": base.reference, "identity": dict(base.identity)},
        dataset=asdict(dataset),
        config_sha256=config.digest,
        environment=asdict(lineage.environment(Path(__file__).parent)),
        records=num_records,
        start_loss=next((trial.start_loss for trial in trials if trial.start_loss is not None), None),
        margin=verdict.MARGIN,
        best=best,
        tuned=list(tuned.values()),
        comparisons=comparisons,
        verdict=verdict.verdict(best, list(tuned.values()), comparisons, reference),
        advised_method=best.method,
        trials=[trial.model_copy(update={"record_nll": [], "record_tokens": []}) for trial in trials],
        seconds=round(seconds, 1),
    )


if __name__ == "__main__":
    main()
