"""The whole flow, in order: data, adapter, comparison, decision, alias, report.

The run's config travels whole as one parameter, the TOML text; between steps pass only URIs and ids.
"""

from kfp import dsl

from components.evaluate.component import evaluate
from components.finetune.component import finetune
from components.gate.component import gate
from components.prepare.component import prepare
from components.promote.component import hold, promote
from components.report.component import report

NAME = "fineloop-retrain"


@dsl.pipeline(name=NAME, description="Retrain one adapter and promote it when the gate lets it pass.")
def retrain(config: str, run_id: str = "") -> None:
    """Retrain one adapter.

    Args:
        config: the run's config as TOML.
        run_id: names the run in the store; empty takes the Kubeflow run's id.
    """
    data = prepare(config=config, run_id=run_id, job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    run = {"config": config, "run_id": data.outputs["run_id"]}
    dataset_uri = data.outputs["dataset_uri"]

    candidate = finetune(**run, dataset_uri=dataset_uri)
    version_uri = candidate.outputs["Output"]

    evaluation = evaluate(**run, dataset_uri=dataset_uri, version_uri=version_uri)
    decision = gate(**run, evaluation_uri=evaluation.outputs["Output"])

    # On one unnamed output and with both branches spelled out: kfp.local skips a lone If on a named output in silence.
    with dsl.If(decision.output == True, name="passed"):  # noqa: E712 - kfp overloads ==
        promoted = promote(**run)
    with dsl.Else(name="refused"):
        held = hold(**run)
    page = report(**run, outcome_uri=dsl.OneOf(promoted.output, held.output))

    # The same config need not mean the same data, champion or weights.
    for task in (data, candidate, evaluation, decision, promoted, held, page):
        task.set_caching_options(False)
