"""The whole pipeline: data, adapter, comparison, decision, alias, report.

The first step takes the run's whole config and writes it to the run's folder in the store. Steps pass each other only
the folder's URI, the config's digest, and the URIs, ids and hashes of their outputs.
"""

from collections.abc import Callable, Mapping
from typing import Any

from kfp import dsl
from kfp.dsl import Model

from components.evaluate.component import evaluate
from components.finetune.component import finetune
from components.gate.component import check, gate
from components.prepare.component import newer, prepare
from components.promote.component import hold, promote, roll_back, skip
from components.report.component import report
from components.tune.component import tune

NAME = "fineloop-retrain"

Configure = Callable[[dsl.PipelineTask], None]
AsStep = Callable[[dsl.PipelineTask, str], dsl.PipelineTask]


@dsl.pipeline(name="register")
def register(version_uri: str) -> None:
    """Show a version as a Model in Kubeflow; the artifact points at the registry, no weights are copied or moved.

    A pipeline of its own: Kubeflow looks for an importer's URI among the inputs of the pipeline around it alone, and
    has an importer wait for no task.
    """
    version = dsl.importer(artifact_uri=version_uri, artifact_class=Model, reimport=False)
    version.set_display_name("Register the version")


def _configured(configure: Configure) -> AsStep:
    """Return a function that configures a task, and gives it the display name that Kubeflow shows."""

    def step(task: dsl.PipelineTask, sentence: str) -> dsl.PipelineTask:
        task.set_display_name(sentence)
        task.set_caching_options(False)  # the same config need not mean the same data, champion or weights
        configure(task)
        return task

    return step


def _begun(data: dsl.PipelineTask) -> dict[str, Any]:
    """Return the arguments of every later step that identify the run, from the first step's outputs."""
    return {name: data.outputs[name] for name in ("run_uri", "config_digest")}


def _on_data(data: dsl.PipelineTask) -> dict[str, Any]:
    """Return those of every later step that rests on the dataset, which may be another's by the time it runs."""
    return {**_begun(data), **{name: data.outputs[name] for name in ("dataset_uri", "dataset_sha256")}}


def _compared_candidate(step: AsStep, run: Mapping[str, Any], *, tunes: bool) -> dsl.PipelineTask:
    """Add the steps that fine-tune a candidate, at a tuned rate if `tunes`, and compare it; return the evaluation.
    `run` is as `_on_data` gives it."""
    candidate = step(finetune(**run), "Fine-tune the adapter")
    if tunes:
        candidate.after(step(tune(**run), "Tune the learning rate"))
    version_uri = candidate.outputs["Output"]
    register(version_uri=version_uri).set_display_name("Register the version")
    return step(evaluate(**run, version_uri=version_uri), "Compare it with base and champion")


def _checked(step: AsStep, run: Mapping[str, Any]) -> None:
    """Add the steps that check production on what came since, and roll it back where the config says so."""
    since = step(newer(**run), "Find what came since")
    look = step(check(**run, dataset_uri=since.output), "Check what is in production")
    with dsl.If(look.outputs["Output"] == True, name="Worse: roll back"):  # noqa: E712 - kfp overloads ==
        step(roll_back(**run, version=look.outputs["version"], reason=look.outputs["reason"]), "Roll it back")


def build_check(configure: Configure) -> dsl.base_component.BaseComponent:
    """Build the pipeline of `fineloop adapters check`: the run has begun."""

    @dsl.pipeline(name="fineloop-check", description="Check what is in production on records that came since.")
    def check_production(run_uri: str, config_digest: str) -> None:
        """Find the records, compare, and roll back where the config says so."""
        _checked(_configured(configure), {"run_uri": run_uri, "config_digest": config_digest})

    return check_production


def build(
    configure: Configure = lambda task: None, *, tunes: bool = False, checks: bool = False
) -> dsl.base_component.BaseComponent:
    """Build the pipeline; `configure` sets what each task needs where it will run: time, memory, retries, secrets.

    `tunes` adds the step that tunes the learning rate, for configs whose `tune.when` is not never, and `checks` those
    that look at production when nothing is trained, for configs with `check.when_skipped`.
    """

    @dsl.pipeline(name=NAME, description="Retrain one adapter on fresh data; promote it when the gate lets it pass.")
    def retrain(
        config: dict[str, Any],
        adapter_name: str = "",
        base_model: str = "",
        data_source: str = "",
        method_name: str = "",
        rank: int = 0,
        learning_rate: float = 0.0,
        epochs: int = 0,
        num_workers: int = 0,
        train_without_new_data: bool = False,
        run_id: str = "",
    ) -> None:
        """Retrain one adapter. Every parameter but config replaces one key of it; empty or 0 leaves the key as it is.

        Args:
            config: the run's config, its sections as JSON objects.
            adapter_name: adapter.name.
            base_model: model.base.
            data_source: data.source.
            method_name: method.name.
            rank: method.rank.
            learning_rate: train.learning_rate.
            epochs: train.epochs.
            num_workers: ray.num_workers.
            train_without_new_data: go on even when data.min_new_records says to skip.
            run_id: names the run in the store; empty takes the Kubeflow run's id.
        """
        step = _configured(configure)
        this_run = {"run_id": run_id, "job_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
        page = step(report(config=config, **this_run), "Write the report")
        with dsl.ExitHandler(page, name="Prepare, train, compare, decide"):
            data = step(
                prepare(
                    config=config,
                    adapter_name=adapter_name,
                    base_model=base_model,
                    data_source=data_source,
                    method_name=method_name,
                    rank=rank,
                    learning_rate=learning_rate,
                    epochs=epochs,
                    num_workers=num_workers,
                    train_without_new_data=train_without_new_data,
                    is_decided=True,
                    **this_run,
                ),
                "Prepare the data",
            )
            run, on_data = _begun(data), _on_data(data)
            # Two conditions, because an If with an Else is one more graph: one more pod, and one more click in the UI.
            # kfp.local resolves only outputs called Output, and would silently skip a lone If on any other.
            with dsl.If(data.outputs["Output"] == True, name="New data: train, compare, decide"):  # noqa: E712 - kfp overloads ==
                evaluation = _compared_candidate(step, on_data, tunes=tunes)
                decision = step(gate(**on_data, evaluation_uri=evaluation.outputs["Output"]), "Decide")
                with dsl.If(decision.outputs["Output"] == True, name="Better: promote"):  # noqa: E712 - as above
                    # The training may write to the record's folder too, so the gate's record is verified by its sha256.
                    step(promote(**on_data, decision_sha256=decision.outputs["decision_sha256"]), "Promote it")
                with dsl.If(decision.outputs["Output"] == False, name="Not better: hold"):  # noqa: E712 - as above
                    step(hold(**run), "Leave the alias as it is")
            with dsl.If(data.outputs["Output"] == False, name="Nothing new: skip"):  # noqa: E712 - as above
                step(skip(**run), "Skip the training")
                if checks:
                    _checked(step, run)

    return retrain


def _prepared(step: AsStep, config: Any, run_id: Any) -> dsl.PipelineTask:
    """Add the step that prepares the data, whether it is new or not."""
    texts = dict.fromkeys(("adapter_name", "base_model", "data_source", "method_name"), "")
    numbers = {"rank": 0, "learning_rate": 0.0, "epochs": 0, "num_workers": 0}
    this_run = {"run_id": run_id, "job_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    return step(prepare(config=config, **texts, **numbers, train_without_new_data=True, **this_run), "Prepare the data")


def build_train(*, tunes: bool = False) -> dsl.base_component.BaseComponent:
    """Build the pipeline of `fineloop train`."""

    @dsl.pipeline(name="fineloop-train", description="Train one adapter and compare it: a version without an alias.")
    def train(config: dict[str, Any], run_id: str) -> None:
        """Prepare, fine-tune and evaluate, whether the data is new or not; no gate and no alias."""
        step = _configured(lambda task: None)
        data = _prepared(step, config, run_id)
        _compared_candidate(step, _on_data(data), tunes=tunes)

    return train


def build_train_on(dataset_uri: str) -> dsl.base_component.BaseComponent:
    """Build the pipeline of `fineloop reproduce`: the dataset exists, and the run has begun."""

    @dsl.pipeline(name="fineloop-train-on", description="Train one adapter on a dataset that is there; compare it.")
    def train(run_uri: str, config_digest: str) -> None:
        """Fine-tune and evaluate; no gate and no alias."""
        step = _configured(lambda task: None)
        run = {"run_uri": run_uri, "config_digest": config_digest}
        _compared_candidate(step, {**run, "dataset_uri": dataset_uri, "dataset_sha256": ""}, tunes=False)

    return train


@dsl.pipeline(name="fineloop-sweep", description="Find the best learning rate; nothing is published.")
def sweep(config: dict[str, Any], run_id: str) -> None:
    """Prepare, and try rates and methods on the data."""
    step = _configured(lambda task: None)
    data = _prepared(step, config, run_id)
    step(tune(**_on_data(data)), "Tune the learning rate")


retrain = build()
