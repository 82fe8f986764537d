"""Kubeflow step: one page that tells the whole run, however it ended."""

from kfp import dsl
from kfp.dsl import HTML, Output, PipelineTaskFinalStatus

from components.step.kfp import COMPONENT


@dsl.component(**COMPONENT)
def report(config: str, run_id: str, job_id: str, status: PipelineTaskFinalStatus, page: Output[HTML]) -> str:
    """Write the report and return its URI. It runs last, also after a failure."""
    from pathlib import Path

    from components.report.report import run_report
    from components.step.step import step

    with step("report", config, run_id or job_id, as_begun=True) as run:
        report_uri = run_report(run.config, run.store, run.run_id)
        Path(page.path).write_bytes(run.store.get(run.store.key(report_uri)))
        run.result.update(report_uri=report_uri, state=status.state)
    return report_uri
