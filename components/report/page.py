"""Renders a run's files as one self-contained HTML page: no font, no request, and no script but the one that searches
its own tables."""

from markupsafe import Markup

from components.report import comparison, forest, run_files, sections
from components.report.comparison import harness, past_decisions, slices, suites
from components.report.forest import loss_curve
from components.report.html import count, moment, sure_once, template
from components.report.run_files import RunFiles
from components.report.sections import explained, headline, next_steps
from components.shared.durations import counted, duration


def build_report(run: RunFiles, *, pages_at: str = "") -> str:
    """Render the whole page. Every text that comes from data or from a model is escaped.

    `pages_at` is the path from this page to the registry's pages; if it is empty, none is linked.
    """
    shown = sections.samples(run)
    wrong, rest = sections.wrong_answers(run)
    champion, top, rules = run.model("champion"), headline(run), comparison.rules(run)
    sentences = sure_once("\0".join([*top.reasons, *(row.rule.text for row in rules)])).split("\0")
    return template("report.html").render(
        run=run,
        pages_at=pages_at,
        explained=explained,
        forgotten=sections.sentence(run),
        headline=top,
        reasons=sentences[: len(top.reasons)],
        rule_texts=sentences[len(top.reasons) :],
        facts=sections.run_facts(run),
        costs=sections.costs(run),
        names=comparison.names(run),
        champion=champion.version or "a version without a name" if champion is not None else None,
        num_evaluated=count(run.evaluation.records) if run.evaluation else None,
        panels=comparison.panels(run),
        table=comparison.table(run),
        intervals=comparison.intervals(run),
        slices=slices(run),
        suites=suites(run),
        harness=harness(run),
        past_decisions=past_decisions(run),
        rules=rules,
        samples=shown,
        next_steps=next_steps(run),
        classes=run_files.by_class(run.evaluation.confusion if run.evaluation else None),
        matrix=run_files.matrix(run.evaluation.confusion if run.evaluation else None),
        wrong=wrong,
        rest=rest,
        counted=counted,
        right_counts=sections.right_counts(shown),
        curve=loss_curve(run.metrics),
        rates=Markup(forest.picture(run.sweep)) if run.sweep else None,
        data=sections.data_profile(run.profile, run.replayed),
        steps=sections.step_times(run),
        total_time=duration(sum(step.seconds for step in run.steps)),
        origin=sections.origin(run),
        generated_at=moment(run.generated_at),
    )
