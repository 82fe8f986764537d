"""From what a run left behind to one HTML page that needs nothing else: no script, no font, no request."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from components.report import comparison, rates, sections
from components.report.curve import loss_curve
from components.report.headline import headline
from components.report.numbers import count, moment
from components.report.run_files import RunFiles
from components.shared.durations import duration

TEMPLATES = Path(__file__).parent / "templates"


def build_report(run: RunFiles) -> str:
    """The whole page. Every text that came with data or from a model is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["tight"] = _tight
    shown = sections.samples(run)
    champion = run.model("champion")
    return environment.get_template("report.html").render(
        run=run,
        headline=headline(run),
        facts=sections.run_facts(run),
        names=comparison.names(run),
        champion=champion.version or "a version without a name" if champion is not None else None,
        num_evaluated=count(run.evaluation.records) if run.evaluation else None,
        panels=comparison.panels(run),
        table=comparison.table(run),
        intervals=comparison.intervals(run),
        rules=comparison.rules(run),
        samples=shown,
        right_counts=sections.right_counts(shown),
        curve=loss_curve(run.metrics),
        rates=Markup(rates.picture(run.sweep)) if run.sweep else None,
        data=sections.data_profile(run),
        steps=sections.step_times(run),
        total_time=duration(sum(step.seconds for step in run.steps)),
        origin=sections.origin(run),
        generated_at=moment(run.generated_at),
    )


def _tight(text: str) -> str:
    """Keep a number and its per cent sign on one line."""
    return text.replace(" %", "\u00a0%")
