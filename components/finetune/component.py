"""Kubeflow step: a Ray job trains the adapter and publishes it as a version."""

from kfp import dsl

from components.step.step import COMPONENT


@dsl.component(**COMPONENT)
def finetune(run_uri: str, config_digest: str, dataset_uri: str, dataset_sha256: str) -> str:
    """Fine-tune on the dataset and return the version's URI."""
    from components.finetune.finetune import finetune as train
    from components.step.step import step

    with step("finetune", run_uri, config_digest, dataset_uri, dataset_sha256) as step_run:
        version_uri = train(step_run, dataset_uri=dataset_uri)
    return version_uri
