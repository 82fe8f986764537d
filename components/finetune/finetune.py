"""The finetune step: takes a dataset and publishes a version of the adapter.

One Ray job trains the version and then compares it, and the evaluate step waits for that: the job is admitted to the
cluster only once, and no other job runs in between. Where the registry trusts keys, the job only trains.
"""

from components.ray_cluster.submit import require_disk, submit_step
from components.records import runs
from components.records.steps import TrainResult
from components.records.sweep import TunedRate
from components.registry.between_runs import require_none_erased
from components.shared.errors import ConfigError
from components.shared.protocol import TRAINED
from components.step.step import StepRun


def finetune(step_run: StepRun, *, dataset_uri: str) -> str:
    """Train on the dataset and return the URI of the version that the job published.

    Raises:
        ConfigError: the config wants its rate tuned, and no step has done that; or no pod's disk is large enough for
            the base.
        DataError: a record of the dataset was erased.
        FineloopError: the error that the job failed with; a JobError where it said none or left no result.
    """
    when = step_run.config.tune.when
    if when != "never" and runs.find(step_run.store, step_run.run_id, TunedRate) is None:
        raise ConfigError(
            f"tune.when is {when}, and this pipeline was made without the step that tunes: `fineloop submit` and "
            "`fineloop compile` make it for the config that they are given; else set tune.when=never"
        )
    require_none_erased(step_run.store, dataset_uri)
    require_disk(step_run.config)
    only = ["--train-only"] if step_run.store.trusted_keys else []
    upto = "" if only else TRAINED
    job_id = submit_step(step_run, "candidate", "--dataset", dataset_uri, *only, upto=upto)
    result = runs.left_by(job_id, step_run.store, step_run.run_id, TrainResult)
    step_run.result.update(result.model_dump(mode="json", exclude={"format"}))
    return result.version_uri
