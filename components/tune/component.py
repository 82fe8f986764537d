"""Kubeflow step: where a sweep is due, a Ray job finds the learning rate that the next step trains at."""

from kfp import dsl
from kfp.dsl import Metrics, Output

from components.step.step import COMPONENT


@dsl.component(**COMPONENT)
def tune(run_uri: str, config_digest: str, dataset_uri: str, dataset_sha256: str, metrics: Output[Metrics]) -> float:
    """Sweep on the dataset, or remember an earlier sweep, and return the learning rate that the run trains at."""
    from components.step.step import step
    from components.tune.tune import tune as find_rate

    with step("tune", run_uri, config_digest, dataset_uri, dataset_sha256) as step_run:
        rate = find_rate(step_run, dataset_uri=dataset_uri)
        metrics.log_metric("learning_rate", rate)
    return rate
