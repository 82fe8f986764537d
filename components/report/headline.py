"""The top of the page: what was decided, what it changed, and why, in words for someone who reads nothing else."""

from dataclasses import dataclass
from typing import Literal

from components.records.steps import Role, StepRecord
from components.registry.aliases import PRODUCTION
from components.report import continued
from components.report.numbers import count
from components.report.run_files import RunFiles
from components.shared.metrics import is_metric, metric_of

Verdict = Literal["promote", "hold", "skipped", "failed", "open"]


@dataclass(frozen=True)
class Headline:
    """Verdict, title, one sentence with numbers (empty if a step failed before there were any), and the reasons."""

    verdict: Verdict
    badge: str
    title: str
    lead: str
    consequence: str
    reasons: tuple[str, ...]


def failed_step(run: RunFiles) -> StepRecord | None:
    """Return the step that the run failed in; a decision stands whatever fails after it, except for a promotion."""
    failed = (step for step in run.steps if not step.succeeded)
    of_interest = (step for step in failed if (step.step == "promote" if run.decision else step.step != "report"))
    return next(of_interest, None)


def headline(run: RunFiles) -> Headline:
    """Word the outcome of a run, however far it got."""
    decision, failed = run.decision, failed_step(run)
    if failed is not None:
        error = failed.result.get("error") or {}
        message = str(error.get("message") or "The step's log says why.")
        consequence = (
            f"The alias {run.alias} did move: it points to {decision.version} now. Only what follows a promotion is "
            "missing, so run the step again."
            if failed.moved_alias and decision is not None
            else f"Nothing was promoted: the alias {run.alias} is as it was before this run."
        )
        title = f"{run.adapter}: the {failed.step} step failed"
        return Headline("failed", "Failed", title, _lead(run) if run.evaluation else "", consequence, (message,))
    if decision is None:
        return Headline("open", "No decision", f"{run.adapter}: no decision was made", _lead(run), _undecided(run), ())
    if decision.decision == "skipped":
        title = f"{run.adapter}: there is too little new to train on"
        consequence = f"The alias {run.alias} is as it was. What is new counts again next time."
        return Headline("skipped", "Skipped", title, "Nothing was trained.", consequence, decision.reasons)
    version, champion = decision.version, decision.champion
    if decision.promoted:
        promotion = run.step("promote")
        moved = promotion is not None and promotion.succeeded
        before = f"{champion} before it" if champion else "nothing before it"
        consequence = (
            f"The alias {run.alias} points to {version} now, and pointed to {before}."
            if moved
            else f"The alias {run.alias} has not been moved by this run; {version} may take it."
        )
        title = f"{run.adapter}: a new version {'is in' if moved else 'may go to'} {run.alias}"
        return Headline("promote", "Promoted" if moved else "Promote", title, _lead(run), consequence, decision.reasons)
    title = f"{run.adapter}: {run.alias} stays {'as it is' if champion else 'empty'}"
    consequence = (
        f"{run.alias.capitalize()} keeps {champion}. " if champion else ""
    ) + f"The candidate {version} stays in the registry without an alias, so that it can be looked at."
    if champion and champion == version:
        consequence = f"This run made the same version again, so there was nothing to move {run.alias} to."
    if decision.waits:
        consequence = (
            f"{run.alias.capitalize()} {f'keeps {champion}' if champion else 'stays empty'} until a person approves "
            f"{version}: fineloop adapters approve {run.adapter}@{version} --by NAME --reason TEXT"
            f"{'' if run.alias == PRODUCTION else f' --alias {run.alias}'}"
        )
    badge = "Held" if decision.verdict in (None, "hold") else f"Held: {decision.verdict}"
    return Headline("hold", badge, title, _lead(run), consequence, decision.reasons)


def _undecided(run: RunFiles) -> str:
    if run.evaluation is None:
        return f"The run ended before an evaluation; the alias {run.alias} is as it was."
    return f"The candidate was evaluated, but no gate was asked to decide; the alias {run.alias} is as it was."


def _lead(run: RunFiles) -> str:
    """What changed, candidate against champion and base, in at most two sentences; and where the training began."""
    if run.evaluation is None:
        return "There are no measurements of the candidate."
    sentences = []
    ours = run.metric("candidate", "exact_match")
    if ours is not None:
        sentences.append(
            f"On {count(run.evaluation.records)} held-out records the candidate gives the exact answer "
            f"{metric_of('exact_match').text(ours)} of the time{_others(run, 'exact_match')}."
        )
    key = (run.decision.policy if run.decision else {}).get("metric", "loss")
    value = run.metric("candidate", key)
    if value is not None and is_metric(key) and key != "exact_match":
        metric = metric_of(key)
        better = "lower" if metric.lower_is_better else "higher"
        sentences.append(f"Its {metric.label} ({better} is better) is {metric.text(value)}{_others(run, key)}.")
    text = " ".join(sentences) or "The candidate's metrics were not measured."
    return f"{text} {continued.sentence(run)}".strip()


def _others(run: RunFiles, key: str) -> str:
    called: dict[Role, str] = {"champion": f"{run.alias}'s version so far", "base": "the base model"}
    values = {name: run.metric(role, key) for role, name in called.items()}
    others = [f"{metric_of(key).text(value)} for {name}" for name, value in values.items() if value is not None]
    return f", against {' and '.join(others)}" if others else ""
