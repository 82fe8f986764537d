"""Kubeflow step: one page that tells the whole run."""

from kfp import dsl
from kfp.dsl import HTML, Output

from components.shared.step import COMPONENT


@dsl.component(**COMPONENT)
def report(config: str, run_id: str, outcome_uri: str, page: Output[HTML]) -> str:
    """Write the report and return its URI. `outcome_uri` is what the run ended with: an event or a refusal."""
    from pathlib import Path

    from components.report.report import run_report
    from components.shared.step import step

    with step("report", config, run_id) as run:
        report_uri = run_report(run.config, run.store, run.run_id)
        Path(page.path).write_bytes(run.store.get(run.store.key(report_uri)))
        run.result.update(report_uri=report_uri, outcome_uri=outcome_uri)
    return report_uri
