"""The evaluate step: takes a version and returns the comparison of base, champion and candidate.

The Ray job that trained the version does the work. If that job is gone, another one takes the version as it is.

Where the registry trusts keys, whoever trains must not decide what is promoted: a job of its own measures, with an
account of its own that writes where a training's may not, and this step signs what it has written.
"""

import os

from components.ray_cluster.submit import submit_step
from components.records import runs
from components.records.steps import ROLES, Evaluation
from components.registry import signing
from components.shared.errors import JobError
from components.shared.protocol import TRAINED
from components.step.step import StepRun


def evaluate(step_run: StepRun, *, dataset_uri: str, version_uri: str) -> Evaluation:
    """Measure the version on held-out records and return the result that the job wrote. Raises FineloopError: the error
    that the job failed with; a JobError where it said none or left no result."""
    apart, key = bool(step_run.store.trusted_keys), signing.signer_from(os.environ, signing.OF_EVALUATIONS)
    if apart:
        # The job reads the config from the run's folder, where a training may write.
        about = ("--dataset", dataset_uri, "--version", version_uri, "--config-digest", step_run.config.digest)
        job_id = submit_step(step_run, "evaluate", *about, ray=step_run.config.ray.for_evaluation())
    else:
        job_id = submit_step(step_run, "candidate", "--dataset", dataset_uri, after=TRAINED)
    evaluation = runs.left_by(job_id, step_run.store, step_run.run_id, Evaluation)
    compared, wanted = evaluation.model("candidate"), version_uri.rstrip("/").rpartition("/")[2]
    if compared is None or compared.version != wanted:
        raise JobError(f"Ray job {job_id} did not compare {wanted}, which this run has published")
    if apart and key:
        signing.sign_evaluation(step_run.store, step_run.config.adapter.name, step_run.run_id, key)
    elif apart:
        step_run.say(f"not signed, so that no gate decides on it: there is no key in {signing.OF_EVALUATIONS[0]}")
    step_run.result.update(records=evaluation.records)
    return evaluation


def flat_metrics(evaluation: Evaluation) -> dict[str, float]:
    """All measured numbers by `<role>_<metric>`, the names by which the Kubeflow UI compares runs."""
    return {
        f"{role}_{key}": value
        for role in ROLES
        if (model := evaluation.model(role))
        for key in model.metrics
        if (value := evaluation.metric(role, key)) is not None
    }
