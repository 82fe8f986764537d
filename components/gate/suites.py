"""The rule that the candidate has not unlearned what the base can do outside the domain; pure."""

from components.config.gate import GateConfig
from components.gate import holm
from components.records.steps import Evaluation, RuleResult, Suite
from components.shared.paired import least_loss, mcnemar, shown_worse

FIELD = "gate.suite_worse_by"


def no_suite_is_worse(margin: float, policy: GateConfig, evaluation: Evaluation) -> RuleResult:
    """Check that no suite shows the candidate passing fewer items than the base, by more than the margin.

    A suite is not judged if it was left out, or if the base passes so few of its items that losing them all would not
    show. If none is judged, the gate cannot tell. The judged suites share one error rate (Holm).
    """
    measured = [suite for suite in evaluation.suites if not suite.left_out]
    unknown = [suite.name for suite in measured if suite.won_and_lost("base") is None]
    judged = [suite for suite in measured if not unknown and _can_show(suite, margin, policy.confidence)]

    def shows(index: int, level: float) -> bool:
        return shown_worse(*_counts(judged[index]), judged[index].items, margin, level)

    worse = [judged[index] for index in sorted(holm.found(len(judged), policy.confidence, shows))]
    level = holm.level(policy.confidence, max(1, len(judged)))
    allowed = f"by more than {margin * 100:.10g} points" if margin else "at all"
    return RuleResult(
        name="suites",
        field=FIELD,
        title="Can still do what the base can",
        against="base",
        bound=margin,
        bound_text=f"in no suite shown to be worse {allowed}",
        confidence=level,
        passed=bool(judged) and not worse,
        undecided=not judged and not unknown and bool(evaluation.suites),
        text=_text(evaluation.suites, judged, worse, unknown, margin, level),
    )


def _can_show(suite: Suite, margin: float, confidence: float) -> bool:
    """Whether it would show if the candidate failed every item that the base passes."""
    return shown_worse(0, suite.passed("base") or 0, suite.items, margin, confidence)


def _counts(suite: Suite) -> tuple[int, int]:
    counts = suite.won_and_lost("base")
    assert counts is not None
    return counts


def _summary(suite: Suite) -> str:
    won, lost = _counts(suite)
    return (
        f"{suite.title} ({suite.passed('candidate')} of {suite.items} items against {suite.passed('base')}; {lost} "
        f"lost and {won} won, which by chance happens with probability {mcnemar(won, lost):.2g} if they are equally "
        "good, by McNemar's exact test)"
    )


def _text(
    suites: tuple[Suite, ...], judged: list[Suite], worse: list[Suite], unknown: list[str], margin: float, level: float
) -> str:
    if not suites:
        return "No suite was asked, so this rule cannot be checked and counts as failed."
    if unknown:
        return f"Of {', '.join(unknown)} it is not known what base and candidate pass, so this rule counts as failed."
    unjudged = "".join(f" {each.title} is not judged: {_why(each)}." for each in suites if each not in judged)
    if not judged:
        return f"No suite can tell whether the candidate unlearned anything.{unjudged}"
    than = f" by more than {margin * 100:.10g} points" if margin else ""
    floors = {each.title: least_loss(each.items, margin, level) for each in judged}
    floor = ", ".join(f"{title} {'more than it has' if least is None else least}" for title, least in floors.items())
    sure = f"The fewest lost items that show, with {level * 100:.4g} % confidence in each: {floor}."
    if worse:
        how = f"The candidate passes fewer items than the base model{than} in {len(worse)} of {len(judged)} suites"
        return f"{how}: {'; '.join(map(_summary, worse))}. {sure}{unjudged}"
    lowest = min(judged, key=lambda each: _counts(each)[0] - _counts(each)[1])
    how = f"In none of {len(judged)} suites is the candidate shown to pass fewer items than the base model{than}"
    return f"{how}; lowest is {_summary(lowest)}. {sure}{unjudged}"


def _why(suite: Suite) -> str:
    if suite.left_out:
        return suite.left_out
    return f"the base passes {suite.passed('base')} of {suite.items} items, and the loss of all of them would not show"
