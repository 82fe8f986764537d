"""The gate's rules: an evaluation in, a decision with its reasons out. No I/O.

A rule that cannot be checked, because a number is missing or not finite, fails: nothing is promoted on a guess.
A new rule is a function here that words itself, called in `decide`; its bound is a key of `GateConfig`.
"""

from collections.abc import Iterator

from components.config.schema import AdapterConfig, GateConfig, Limit
from components.registry.records import Decision, Evaluation, Measured, PairedDifference, Role, RuleResult, finite
from components.shared.errors import DataError
from components.shared.metrics import METRICS, Metric

# Bounds are inclusive in decimal numbers: 0.30 - 0.25 counts as 0.05, although it is less in binary floating point.
ROUNDING = 1e-9


def decide(evaluation: Evaluation, policy: GateConfig, adapter: AdapterConfig) -> Decision:
    """Apply every rule of the policy to an evaluation; the candidate is promoted when all of them pass.

    Raises:
        DataError: the evaluation lacks the candidate or the base, or the candidate is no published version.
    """
    candidate, base = _required(evaluation, "candidate"), _required(evaluation, "base")
    champion = evaluation.model("champion")
    if candidate.version is None:
        raise DataError(
            f"the evaluation of run {evaluation.run_id} names no candidate version: publish it, then evaluate it"
        )
    metric = METRICS[policy.metric]
    paired = {role: found for role, found in evaluation.paired.items() if found and found.metric == metric.key}

    rules: list[RuleResult] = []
    if champion is not None and champion.version is not None:
        rules.append(_is_new(candidate.version, champion.version, adapter.alias))
    rules.append(_better_than_base(metric, policy.better_than_base_by, candidate, base, paired.get("base")))
    rules.append(
        _not_worse_than_champion(
            metric, policy.worse_than_champion_by, candidate, champion, paired.get("champion"), adapter.alias
        )
    )
    for index, limit in enumerate(policy.limits):
        rules.extend(_within(limit, index, candidate))
    rules.extend(_broken_numbers(candidate, {rule.metric for rule in rules}))

    failed = [rule for rule in rules if not rule.passed]
    return Decision(
        decision="hold" if failed else "promote",
        adapter=adapter.name,
        alias=adapter.alias,
        run_id=evaluation.run_id,
        reasons=tuple(rule.text for rule in failed or rules),
        rules=tuple(rules),
        version=candidate.version,
        champion=champion.version if champion is not None else None,
        policy=policy.model_dump(mode="json"),
    )


def _required(evaluation: Evaluation, role: Role) -> Measured:
    measured = evaluation.model(role)
    if measured is None:
        found = ", ".join(name for name, model in evaluation.models.items() if model) or "nothing"
        raise DataError(f"the evaluation has no metrics for the {role}: models holds {found}")
    return measured


def _is_new(version: str, champion: str, alias: str) -> RuleResult:
    passed = version != champion
    return RuleResult(
        name="new_version",
        field="adapter.alias",
        title="Is a new version",
        passed=passed,
        text=f"The candidate is a new version; {alias} points to {champion}."
        if passed
        else f"Nothing changed: the candidate is {champion}, the very version that {alias} points to now.",
    )


def _better_than_base(
    metric: Metric, margin: float, candidate: Measured, base: Measured, paired: PairedDifference | None
) -> RuleResult:
    ours, theirs = _number(candidate, metric), _number(base, metric)
    line = None
    if ours is None or theirs is None:
        passed = False
        text = _unmeasured(metric, candidate, base, "base model")
    else:
        line = metric.better_by(theirs, margin)
        gain = metric.gain(ours, theirs)
        passed = gain >= margin - ROUNDING
        text = (
            f"{_comparison(metric, ours, theirs, gain, 'the base model', margin)}; "
            f"it has to be better by at least {metric.margin_text(margin)}.{_interval_text(metric, paired)}"
        )
    return RuleResult(
        name="better_than_base",
        field="gate.better_than_base_by",
        title=f"{metric.title} better than the base model's",
        metric=metric.key,
        against="base",
        candidate=ours,
        other=theirs,
        bound=margin,
        bound_text=f"better by at least {metric.margin_text(margin)}",
        line=line,
        line_text="" if line is None else f"{_side(metric)} {metric.text(line)}, to beat the base",
        passed=passed,
        text=text,
    )


def _not_worse_than_champion(
    metric: Metric,
    tolerance: float,
    candidate: Measured,
    champion: Measured | None,
    paired: PairedDifference | None,
    alias: str,
) -> RuleResult:
    ours, theirs = _number(candidate, metric), _number(champion, metric)
    line = None
    if champion is None:
        passed = True
        text = f"The alias {alias} points to no version yet, so there is none that the candidate could be worse than."
    elif ours is None or theirs is None:
        passed = False
        text = _unmeasured(metric, candidate, champion, f"{alias} version")
    else:
        line = metric.better_by(theirs, -tolerance)
        gain = metric.gain(ours, theirs)
        passed = gain >= -tolerance - ROUNDING
        allowed = f"be worse by at most {metric.margin_text(tolerance)}" if tolerance else "not be worse at all"
        text = (
            f"{_comparison(metric, ours, theirs, gain, alias, -tolerance)}; it may {allowed}."
            f"{_interval_text(metric, paired)}"
        )
    return RuleResult(
        name="not_worse_than_champion",
        field="gate.worse_than_champion_by",
        title=f"{metric.title} not worse than {alias}'s",
        metric=metric.key,
        against="champion",
        candidate=ours,
        other=theirs,
        bound=tolerance,
        bound_text=f"worse by at most {metric.margin_text(tolerance)}",
        line=line,
        line_text="" if line is None else f"{_side(metric)} {metric.text(line)}, not to fall behind {alias}",
        passed=passed,
        text=text,
    )


def _within(limit: Limit, index: int, candidate: Measured) -> Iterator[RuleResult]:
    metric = METRICS[limit.metric]
    ours = _number(candidate, metric)
    for side, bound, words in (("min", limit.min, "at least"), ("max", limit.max, "at most")):
        if bound is None:
            continue
        if ours is None:
            passed = False
            text = _unmeasured(metric, candidate)
        else:
            passed = ours >= bound - ROUNDING if side == "min" else ours <= bound + ROUNDING
            text = _limit_text(metric, side, ours, bound, passed=passed)
        enough = f"{metric.title} {'high' if side == 'min' else 'low'} enough"
        yield RuleResult(
            name=f"limit_{side}",
            field=f"gate.limits[{index}].{side}",
            title="Answers depend on their prompts" if metric.key == "prompt_gain" and side == "min" else enough,
            metric=metric.key,
            candidate=ours,
            bound=bound,
            bound_text=f"{words} {metric.bound_text(bound)}",
            line=bound,
            line_text=f"limit: {words} {metric.text(bound)}",
            passed=passed,
            text=text,
        )


def _broken_numbers(candidate: Measured, compared: set[str | None]) -> Iterator[RuleResult]:
    """A NaN or an infinity in a metric that no rule compares still means that the evaluation cannot be trusted."""
    for key, value in candidate.metrics.items():
        if key in METRICS and key not in compared and value is not None and finite(value) is None:
            metric = METRICS[key]
            yield RuleResult(
                name="finite_numbers",
                field="evaluate",
                title=f"{metric.title} is a sound number",
                metric=key,
                passed=False,
                text=f"The candidate's {metric.label} is {value}: the evaluation is not sound.",
            )


def _side(metric: Metric) -> str:
    return "at most" if metric.lower_is_better else "at least"


def _comparison(metric: Metric, ours: float, theirs: float, gain: float, other: str, margin: float) -> str:
    if abs(gain) < ROUNDING:
        how = f"the same as {other}'s"
    else:
        amount = metric.amount_text(gain, abs(margin))
        how = f"{'better' if gain > 0 else 'worse'} than {other}'s {metric.text(theirs, ours)} by {amount}"
    return f"The candidate's {metric.label} of {metric.with_unit(ours, theirs)} is {how}"


def _interval_text(metric: Metric, paired: PairedDifference | None) -> str:
    """One more sentence with the paired 95 % interval, or nothing when there is none."""
    if paired is None or paired.ci95 is None:
        return ""
    low, high = paired.ci95
    if low > 0:
        meaning = "it lies above zero, so the improvement is not down to chance"
    elif high < 0:
        meaning = "it lies below zero, so the loss of quality is not down to chance"
    else:
        meaning = "it includes zero, so the two may be equally good"
    bounds = f"{metric.signed_text(low)} to {metric.signed_text(high)}"
    return f" Record by record ({paired.records} of them), the 95 % interval of the improvement is {bounds}: {meaning}."


def _limit_text(metric: Metric, side: str, ours: float, bound: float, *, passed: bool) -> str:
    shown = metric.with_unit(ours, bound)
    demand = f"{'at least' if side == 'min' else 'at most'} {metric.bound_text(bound)} is required"
    if metric.key != "prompt_gain" or side != "min":
        direction = "within" if passed else "below" if side == "min" else "above"
        return f"The candidate's {metric.label} of {shown} is {direction} the limit: {demand}."
    if passed:
        return (
            f"Answers depend on their prompts: seeing its own prompt instead of another record's helps by {shown}; "
            f"{demand}."
        )
    return (
        f"Answers do not depend on their prompts: seeing its own prompt instead of another record's helps by {shown}; "
        f"{demand}. Are prompts and answers shuffled or mislabelled in the data?"
    )


def _unmeasured(metric: Metric, candidate: Measured, other: Measured | None = None, name: str = "") -> str:
    at_fault, measured = ("candidate", candidate) if _number(candidate, metric) is None else (name, other)
    value = measured.metrics.get(metric.key) if measured else None
    seen = "was not measured" if value is None else f"is {value}, not a finite number"
    return f"The {at_fault}'s {metric.label} {seen}, so this rule cannot be checked and counts as failed."


def _number(measured: Measured | None, metric: Metric) -> float | None:
    return finite(measured.metrics.get(metric.key)) if measured else None
