"""The tune step: takes a dataset and returns the learning rate to train at. `tune.when` says whether it sweeps."""

from components.config.train import When
from components.ray_cluster.submit import require_disk, submit_step
from components.records import runs
from components.records.sweep import SweepResult, TunedRate
from components.registry import between_runs
from components.registry.between_runs import FoundRate, require_none_erased
from components.step.step import StepRun
from components.store import folders


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
    remembered, prior = between_runs.recall_rate(store, config), config.learning_rate
    if is_due(config.tune.when, remembered, dataset["dataset_id"]) and (
        swept := _swept(step_run, dataset_uri, dataset["train_records"])
    ):
        remembered = swept
    if remembered is None:
        step_run.say(f"tune.methods leaves {config.method.name} out: the rate is {prior:g}")
        rate = TunedRate(learning_rate=prior, prior=prior)
    else:
        step_run.say(f"the rate is {remembered.learning_rate:g}, which the sweep of run {remembered.run_id} found")
        rate = TunedRate(learning_rate=remembered.learning_rate, prior=prior, sweep_run_id=remembered.run_id)
    runs.write(store, run_id, rate)
    step_run.result.update(rate.model_dump(mode="json", exclude={"format"}))
    return rate.learning_rate


def is_due(when: When, remembered: FoundRate | None, dataset_id: str) -> bool:
    """Whether a run sweeps, given the remembered rate and the dataset that it trains on."""
    if when == "data_changed":
        return remembered is None or remembered.dataset_id != dataset_id
    return when == "always" or (when == "no_prior_sweep" and remembered is None)


def _swept(step_run: StepRun, dataset_uri: str, train_records: int) -> FoundRate | None:
    """Sweep, and return and remember the rate for the config's own method; None if only other methods were tried."""
    config, store, run_id = step_run.config, step_run.store, step_run.run_id
    require_disk(config)
    result = runs.left_by(submit_step(step_run, "sweep", "--dataset", dataset_uri), store, run_id, SweepResult)
    trained = (config.method.name, config.method.r, config.train.batch_size)
    for tuned in result.tuned:
        if (tuned.method, tuned.rank, tuned.batch_size) == trained:
            own = FoundRate(
                **tuned.model_dump(include={"learning_rate", "loss", "is_inside", "method", "rank", "batch_size"}),
                run_id=result.run_id,
                dataset_id=str(result.dataset["dataset_id"]),
                base=config.model.base,
                train_records=train_records,
            )
            between_runs.remember_rate(store, config, own)
            return own
    return None
