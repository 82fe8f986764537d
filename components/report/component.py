"""Kubeflow step: one page about the whole run, however it ended."""

from typing import Any

from kfp import dsl
from kfp.dsl import HTML, Output, PipelineTaskFinalStatus

from components.step.step import COMPONENT


@dsl.component(**COMPONENT)
def report(
    config: dict[str, Any], run_id: str, job_id: str, status: PipelineTaskFinalStatus, page: Output[HTML]
) -> str:
    """Write the report and return its URI. It runs last, also after a failure."""
    from pathlib import Path

    from components.report.report import run_report
    from components.step.step import last_step

    with last_step("report", config, run_id or job_id) as step_run:
        step_run.result["state"] = status.state
        report_uri = run_report(step_run.config, step_run.store, step_run.run_id, result=step_run.result)
        Path(page.path).write_bytes(step_run.store.get(step_run.store.key(report_uri)))
    return report_uri
