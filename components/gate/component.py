"""Kubeflow steps: the policy decides whether the candidate may take the alias, and whether its holder is still good."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Markdown, Output

from components.step.step import COMPONENT


@dsl.component(**COMPONENT)
def gate(
    run_uri: str,
    config_digest: str,
    dataset_uri: str,
    dataset_sha256: str,
    evaluation_uri: str,
    summary: Output[Markdown],
) -> NamedTuple("Decided", [("Output", bool), ("decision_sha256", str)]):  # type: ignore[valid-type]
    """Write the decision; returns the record's sha256 and as Output whether to promote. A refusal is no failure."""
    from pathlib import Path

    from components.gate.gate import as_markdown, run_gate
    from components.step.step import step

    with step("gate", run_uri, config_digest, dataset_uri, dataset_sha256) as step_run:
        decision = run_gate(step_run.config, step_run.store, step_run.run_id, evaluation_uri=evaluation_uri)
        Path(summary.path).write_text(as_markdown(decision), encoding="utf-8")
        step_run.result.update(decision=decision.decision, reasons=list(decision.reasons))
    return (decision.promoted, decision.sha256)


@dsl.component(**COMPONENT)
def check(
    run_uri: str,
    config_digest: str,
    dataset_uri: str,
) -> NamedTuple("Checked", [("Output", bool), ("version", str), ("reason", str)]):  # type: ignore[valid-type]
    """Look at what is in production; returns as Output whether it is to go back, and which version it is, and why."""
    from components.gate.check import check as look
    from components.step.step import step

    with step("check", run_uri, config_digest) as step_run:
        goes_back = look(step_run, dataset_uri)
        version, reasons = (step_run.result.get(key, "") for key in ("version", "reasons"))
    return (goes_back, version, " ".join(reasons))
