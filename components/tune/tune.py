"""The tune step: takes a dataset and returns the learning rate to train at. `tune.when` says whether it sweeps."""

import math
from collections.abc import Sequence

from components.config.schema import RunConfig
from components.config.tune import When
from components.ray_cluster.submit import submit_step
from components.records import runs
from components.records.sweep import SweepResult, TunedRate
from components.registry import between_runs
from components.registry.between_runs import FoundRate, require_none_erased
from components.shared.errors import JobError, ObjectMissing
from components.step.step import StepRun
from components.store import folders

# Estimates the best learning rate after rank, batch size or data have changed: advice, until a sweep measures it.

SOURCE = "arXiv:2602.04998"
# In that paper LoRA's best rate fell 5.6 times from rank 4 to 256, rose 5.6 times from batches of 16 to 128, and fell
# 3.1 times from 5,000 records to 395,000. These are the slopes of straight lines on logarithmic axes.
PER_RANK = -math.log(5.6) / math.log(256 / 4)
PER_BATCH_SIZE = math.log(5.6) / math.log(128 / 16)
PER_RECORDS = -math.log(3.1) / math.log(395 / 5)
LEAST = math.log(10) / 4
"""The smallest change of the rate's logarithm that is worth advice: a quarter decade, a sweep's finest step."""


def advised(known: Sequence[FoundRate], config: RunConfig, train_records: int) -> str:
    """Advice on the rate: the one found in the most similar circumstances, moved along the paper's slopes. Empty if no
    rate is known, or it hardly moves."""
    moves = [(found, moved(found, config, train_records)) for found in known]
    found, move = min(moves, key=lambda each: sum(map(abs, each[1].values())), default=(None, {}))
    if found is None or abs(sum(move.values())) < LEAST:
        return ""
    times = math.exp(sum(move.values()))
    return (
        f"run {found.run_id} found {found.learning_rate:.3g}, and since then: {', '.join(move)}. By {SOURCE} LoRA's "
        f"best rate is then {times:.2g} times what it was, here about {found.learning_rate * times:.2g}"
    )


def moved(found: FoundRate, config: RunConfig, train_records: int) -> dict[str, float]:
    """The changes since a rate was found, in words, each with what it adds to the logarithm of the best rate."""
    circumstances = [
        ("rank", found.rank, config.method.r, PER_RANK),
        ("batches of", found.batch_size, config.train.batch_size, PER_BATCH_SIZE),
        ("records", found.train_records, train_records, PER_RECORDS),
    ]
    return {
        f"{what} {then:,} to {now:,}": slope * math.log(now / then)
        for what, then, now, slope in circumstances
        if then != now
    }


def tune(step_run: StepRun, *, dataset_uri: str) -> float:
    """Settle the run's learning rate, write it with its origin to runs/<run_id>/rate.json, and return it.

    Raises:
        DataError: a record of the dataset was erased.
        FineloopError: the error that the sweep failed with.
        JobError: the sweep failed without saying why, or ended without a result.
    """
    config, store, run_id = step_run.config, step_run.store, step_run.run_id
    require_none_erased(store, dataset_uri)
    dataset = folders.read_manifest(store, store.key(dataset_uri).rstrip("/")).about
    found = between_runs.recall_rate(store, config)
    advice = advised([found] if found else between_runs.similar_rates(store, config), config, dataset["train_records"])
    if advice:
        step_run.say(advice)
    if is_due(config.tune.when, found, dataset["dataset_id"]) and (
        swept := _swept(step_run, dataset_uri, dataset["train_records"])
    ):
        found, advice = swept, ""
    if found is None:
        step_run.say(f"tune.methods leaves {config.method.name} out: the rate is {config.learning_rate:g}")
        rate = TunedRate(learning_rate=config.learning_rate, prior=config.learning_rate, advice=advice)
    else:
        step_run.say(f"the rate is {found.learning_rate:g}, which the sweep of run {found.run_id} found")
        rate = TunedRate(
            learning_rate=found.learning_rate, prior=config.learning_rate, sweep_run_id=found.run_id, advice=advice
        )
    runs.write(store, run_id, rate)
    step_run.result.update(rate.model_dump(mode="json", exclude={"format"}))
    return rate.learning_rate


def is_due(when: When, found: FoundRate | None, dataset_id: str) -> bool:
    """Whether a run sweeps, given the remembered rate and the dataset that it trains on."""
    match when:
        case "never":
            return False
        case "always":
            return True
        case "no_prior_sweep":
            return found is None
        case "data_changed":
            return found is None or found.dataset_id != dataset_id


def _swept(step_run: StepRun, dataset_uri: str, train_records: int) -> FoundRate | None:
    """Sweep, and return and remember the rate for the config's own method; None if only other methods were tried."""
    config, store, run_id = step_run.config, step_run.store, step_run.run_id
    submission_id = submit_step(step_run, "sweep", "--dataset", dataset_uri)
    try:
        result = runs.read(store, run_id, SweepResult)
    except ObjectMissing as exc:
        raise JobError(f"Ray job {submission_id} succeeded without its result: {exc}") from exc
    own = _of_config(result, config, train_records)
    if own is not None:
        between_runs.remember_rate(store, config, own)
    return own


def _of_config(result: SweepResult, config: RunConfig, train_records: int) -> FoundRate | None:
    trained = (config.method.name, config.method.r, config.train.batch_size)
    for tuned in result.tuned:
        if (tuned.method, tuned.rank, tuned.batch_size) == trained:
            return FoundRate(
                learning_rate=tuned.learning_rate,
                loss=tuned.loss,
                is_inside=tuned.is_inside,
                method=tuned.method,
                run_id=result.run_id,
                dataset_id=str(result.dataset["dataset_id"]),
                base=config.model.base,
                rank=tuned.rank,
                batch_size=tuned.batch_size,
                train_records=train_records,
            )
    return None
