"""Sweep learning rates, and compare methods at their best: `python -m ray_jobs.sweep --config FILE`.

Ray Tune runs the trials, as many at once as the cluster has workers for; each is trained like a run's own training.
Nothing is done twice: the dataset is prepared and tokenised once, an adapter's own base is created once, and a worker
keeps its base from one trial to the next. An interrupted sweep resumes under its run id, without the trials that have
ended.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from components.config import config_file
from components.config.schema import RunConfig
from components.records import runs
from components.records.sweep import SweepResult, Trial, Tuned
from components.registry import lineage
from components.registry.between_runs import require_none_erased
from components.shared import garbage
from components.shared.errors import JobError
from components.shared.protocol import say
from components.store.store import Store

with garbage.importing():
    from ray_jobs import entry
    from ray_jobs.adapters import own_base
    from ray_jobs.base import attention, base_config, base_model
    from ray_jobs.base.base_model import Base
    from ray_jobs.prepare import prepare
    from ray_jobs.probes.texts import Texts, unread_passages
    from ray_jobs.replaying import with_answers
    from ray_jobs.sweeping import verdict
    from ray_jobs.sweeping.plan import Arm, Plan, Point, prior_rate, servable_as, swept_arms, trial_config
    from ray_jobs.sweeping.trial import Progress
    from ray_jobs.sweeping.verdict import header, row
    from ray_jobs.text import chat_format
    from ray_jobs.training import splits, train_loop
    from ray_jobs.training.splits import PlannedSplit
    from ray_jobs.training.train_job import TrainJob

logger = logging.getLogger(__name__)

STEP = "tune"


def main() -> None:
    """Parse the command line and run the job; the process ends with the exit code of `entry.run`."""
    parser = entry.parser(
        "ray_jobs.sweep",
        "Find the best learning rate, and with tune.methods whether another method is worth more than plain LoRA.",
        "python -m ray_jobs.sweep --config pipelines/configs/icd10.toml --set tune.max_steps=32",
    )
    arguments = entry.takes_data(parser).parse_args()

    def job() -> None:
        config = entry.load_config(arguments.config, arguments.set)
        run_id = arguments.run_id or entry.new_run_id(config.adapter.name)
        result = sweep(config, run_id=run_id, dataset_uri=arguments.dataset)
        say(STEP, result.verdict)

    entry.run(STEP, job)


def sweep(config: RunConfig, *, run_id: str, dataset_uri: str | None = None) -> SweepResult:
    """Run the missing trials of the sweep; the result is also written to runs/<run_id>/sweep.json.

    Raises:
        UserError: config or data cannot work; raised before any trial is started where possible.
        JobError: every trial failed, or training diverged at every rate.
    """

    began = time.monotonic()
    arms = list(swept_arms(config))
    attention.require_installed(config.model.attention)
    store = Store.open(config.registry)
    store.check()
    if dataset_uri is None:
        say(STEP, f"preparing {config.data.source}")
        prepared = prepare(config, store)
        say(STEP, prepared.summary)
        dataset_uri = prepared.uri
    require_none_erased(store, dataset_uri)
    dataset_uri = with_answers(config, store, dataset_uri, lambda line: say(STEP, line), run_id=run_id)
    base = base_model.resolve(config.model, weights=False, registry=store)
    shape = base_config.load(base.path, config.model)
    config = base_config.fitted(config, shape, lambda line: say(STEP, line))
    chat = chat_format.load(base, config.model)
    train_split, validation = splits.read(store, dataset_uri, chat, config, lambda line: say(STEP, line))
    splits.require_embedded(store, chat, shape, config, train_split, validation)
    plan = Plan(config, arms, _ended(config, arms, store, run_id, len(train_split)))
    if plan.trials:
        say(STEP, f"going on after {len(plan.trials)} trials that have ended")
    say(
        STEP,
        f"sweeping {', '.join(dict.fromkeys(arm.method for arm in arms))} on {len(train_split):,} records, judged on "
        f"{len(validation)} that no trial trains on",
    )
    passages = unread_passages(chat, config)
    if plan.compares and len(passages.split):
        say(
            STEP,
            f"each training that compares methods also reads {len(passages.split)} passages of general text, for what "
            "the method forgets (evaluate.general_passages; 0 reads none and saves the time)",
        )
    entry.connect()
    memory = _planned(config, arms, base, train_split)
    _make_bases(config, arms, len(train_split))
    dataset = splits.of_dataset(store, dataset_uri)
    identity = lineage.Base(config.model.base, base.identity)
    job = TrainJob(config_toml="", run_id=run_id, dataset=dataset, base=identity, pad=chat.pad)
    _run_trials(config, plan, store, job, train_split, validation, passages)
    # The base as the trials have read it.
    base = base_model.resolve(config.model, recorded=base.identity, weights=False, registry=store)
    identity = lineage.Base(config.model.base, base.identity)
    result = _result(config, plan, arms, memory, run_id, dataset, identity, len(validation), time.monotonic() - began)
    runs.write(store, run_id, result)
    return result


def _ended(config: RunConfig, arms: Sequence[Arm], store: Store, run_id: str, num_records: int) -> list[Trial]:
    """Trials of an earlier attempt that this config would repeat identically."""
    by_arm = {(arm.method, arm.rank, arm.batch_size): arm for arm in arms}
    kept = []
    for trial in runs.trials(store, run_id):
        arm = by_arm.get((trial.method, trial.rank, trial.batch_size))
        if arm is None:
            continue
        point = Point(arm, trial.learning_rate, trial.seed, trial.compares)
        if trial_config(config, point, num_records).digest == trial.config_digest:
            kept.append(trial)
    return kept


def _planned(config: RunConfig, arms: Sequence[Arm], base: Base, train_split: PlannedSplit) -> dict[Arm, int | None]:
    """Planned bytes of one worker for each arm; refuses what cannot fit before a trial is started."""
    import ray

    from ray_jobs.planning.capacity import before_training, planned_bytes
    from ray_jobs.training.room import wait_for_room

    found: dict[Arm, int | None] = {}
    for arm in arms:
        point = Point(arm, prior_rate(config, arm), config.train.seed)
        trial = trial_config(config, point, len(train_split))
        if not found:
            wait_for_room(trial.ray.cluster, trial.ray.per_worker, 1, lambda line: say(STEP, line))
        before_training(trial, base.path, train_split, ray.nodes())
        found[arm] = planned_bytes(trial, base.path, train_split) if len(arms) > 1 else None
    return found


def _make_bases(config: RunConfig, arms: Sequence[Arm], num_records: int) -> None:
    """Create, once and on a worker, the bases that trials which start together would otherwise each create."""
    import ray

    from ray_jobs.sweeping.trial import make_base

    for arm in arms:
        trial = trial_config(config, Point(arm, prior_rate(config, arm), config.train.seed), num_records)
        if own_base.is_needed(trial.method):
            say(STEP, f"making the base of {arm.method}, or finding it made")
            each = trial.ray.per_worker
            make = ray.remote(num_cpus=each["CPU"], num_gpus=each.get("GPU", 0))(make_base)
            ray.get(make.remote(config_file.dumps(trial)))


def _run_trials(
    config: RunConfig,
    plan: Plan,
    store: Store,
    job: TrainJob,
    train_split: PlannedSplit,
    validation: PlannedSplit,
    passages: Texts,
) -> None:
    from ray import tune

    from ray_jobs.sweeping.trial import Ledger, as_config, run, run_trial, scheduler

    given = {
        "job": job, "train_tokens": train_split.stored, "validation_tokens": validation.stored, "passages": passages,
    }  # fmt: skip
    trainable = tune.with_resources(tune.with_parameters(run_trial, **given), config.ray.per_worker)

    def keep(trial: Trial) -> None:
        runs.write(store, job.run_id, trial)
        say(STEP, row(trial))

    progress = Progress(plan)
    say(STEP, header())
    run(
        trainable,
        plan,
        lambda point: as_config(config, point, len(train_split)),
        scheduler(config.tune.scheduler, config.tune.max_steps or train_loop.num_steps(config.train, len(train_split))),
        Ledger(plan, keep, lambda trial: say(STEP, progress.line(trial))),
        storage_path=store.uri(runs.run_key(job.run_id).rstrip("/")),
    )


def _result(
    config: RunConfig,
    plan: Plan,
    arms: Sequence[Arm],
    memory: dict[Arm, int | None],
    run_id: str,
    dataset: lineage.Dataset,
    base: lineage.Base,
    num_records: int,
    seconds: float,
) -> SweepResult:
    tuned = {arm: found for arm in arms if (found := plan.found(arm, memory[arm]))}
    if not tuned:
        raise JobError(_why_nothing(list(plan.trials.values())))
    contenders = plan.contenders(tuned)
    reference = verdict.reference_of([arm.method for arm in contenders])
    (plain,) = (arm for arm in contenders if arm.method == reference)
    compared = [
        verdict.compare(tuned[arm], plan.seeds_of(arm), tuned[plain], plan.seeds_of(plain), servable_as(config, arm))
        for arm in contenders
        if plan.compares and arm != plain
    ]
    comparisons = [each for each in compared if each]
    best = _best(tuned, contenders, verdict.advised(comparisons, reference, config.tune.margin))
    trials = sorted(plan.trials.values(), key=lambda trial: (trial.method, trial.rank, trial.learning_rate, trial.seed))
    return SweepResult(
        run_id=run_id,
        adapter=config.adapter.name,
        base={"reference": base.reference, "identity": dict(base.identity)},
        dataset=asdict(dataset),
        config_sha256=config.digest,
        environment=asdict(lineage.environment(Path(__file__).parent)),
        records=num_records,
        start_loss=next((trial.start_loss for trial in trials if trial.start_loss is not None), None),
        margin=config.tune.margin,
        best=best,
        tuned=list(tuned.values()),
        comparisons=comparisons,
        verdict=verdict.verdict(best, list(tuned.values()), comparisons, reference, config.tune.margin),
        advised_method=best.method,
        trials=[trial.model_copy(update={"record_nll": [], "record_tokens": []}) for trial in trials],
        seconds=round(seconds, 1),
    )


def _best(tuned: dict[Arm, Tuned], contenders: Sequence[Arm], method: str) -> Tuned:
    (arm,) = (arm for arm in contenders if arm.method == method)
    return tuned[arm]


def _why_nothing(trials: Sequence[Trial]) -> str:
    failed = [trial for trial in trials if trial.status == "failed"]
    if failed:
        first = f"the first, {failed[0].name}: {failed[0].why}"
        return f"no trial ended well, and {len(failed)} of {len(trials)} failed; {first}"
    lowest = min((trial.learning_rate for trial in trials), default=math.nan)
    return (
        f"all {len(trials)} trainings diverged, at rates down to {lowest:.3g}: check the data, or name lower rates in "
        "tune.space.learning_rates"
    )


if __name__ == "__main__":
    main()
