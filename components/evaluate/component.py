"""Kubeflow step: a Ray job compares base, champion and candidate on held-out records."""

from kfp import dsl
from kfp.dsl import ClassificationMetrics, Metrics, Output

from components.step.step import COMPONENT


@dsl.component(**COMPONENT)
def evaluate(
    run_uri: str,
    config_digest: str,
    dataset_uri: str,
    dataset_sha256: str,
    version_uri: str,
    metrics: Output[Metrics],
    confusion: Output[ClassificationMetrics],
) -> str:
    """Evaluate the version and return the evaluation's URI. Few distinct answers also give a confusion matrix."""
    from components.evaluate.evaluate import evaluate as compare
    from components.evaluate.evaluate import flat_metrics
    from components.records import runs
    from components.step.step import step

    with step("evaluate", run_uri, config_digest, dataset_uri, dataset_sha256) as step_run:
        evaluation = compare(step_run, dataset_uri=dataset_uri, version_uri=version_uri)
        metrics.metadata.update(flat_metrics(evaluation))
        if matrix := evaluation.confusion:
            confusion.log_confusion_matrix(matrix["labels"], matrix["counts"])
        uri = step_run.store.uri(runs.key_of(step_run.store, step_run.run_id, runs.EVALUATION))
    return uri
