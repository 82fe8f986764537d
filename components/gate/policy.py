"""The gate's rules: numbers in, a decision with its reasons out. No I/O.

A rule that cannot be checked, because a number is missing or not finite, fails: nothing is promoted on a guess.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from components.config.schema import GateConfig, Limit
from components.gate.sentences import (
    amount_text,
    bound_text,
    interval_text,
    margin_text,
    value_text,
)
from components.shared.errors import DataError
from components.shared.metrics import METRICS

Outcome = Literal["promote", "hold"]

# Bounds are inclusive in decimal numbers: 0.30 - 0.25 counts as 0.05, although it is less in binary floating point.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Rule:
    """One rule as it was applied. `candidate`, `other` and `bound` are the numbers compared, None where none is."""

    name: str
    field: str
    """The config field that sets the bound."""
    metric: str | None
    candidate: float | None
    other: float | None
    bound: float | None
    passed: bool
    text: str
    """One or two sentences for people."""


@dataclass(frozen=True)
class GateDecision:
    """Whether the candidate may take the alias. Holding is an outcome, not an error."""

    decision: Outcome
    reasons: tuple[str, ...]
    """The sentences of the failed rules when held, of every rule when promoted."""
    rules: tuple[Rule, ...]
    version: str | None
    champion: str | None
    policy: GateConfig

    @property
    def promoted(self) -> bool:
        return self.decision == "promote"

    def as_json(self) -> dict[str, Any]:
        """The part of decision.json that follows from the evaluation and the policy; every number in it is finite."""
        return {
            "decision": self.decision,
            "reasons": list(self.reasons),
            "rules": [asdict(rule) for rule in self.rules],
            "version": self.version,
            "champion": self.champion,
            "policy": self.policy.model_dump(mode="json"),
        }


def decide(evaluation: Mapping[str, Any], policy: GateConfig, *, alias: str = "production") -> GateDecision:
    """Apply every rule of the policy to an evaluation; the candidate is promoted when all of them pass.

    `alias` is what the sentences call the champion's place.

    Raises:
        DataError: the evaluation lacks the candidate or the base.
    """
    models = evaluation.get("models") or {}
    for name in ("candidate", "base"):
        if not isinstance(models.get(name), Mapping) or not isinstance(models[name].get("metrics"), Mapping):
            found = ", ".join(models) or "nothing"
            raise DataError(f"the evaluation has no metrics for the {name}: models holds {found}")
    candidate, base, champion = models["candidate"], models["base"], models.get("champion")
    metrics = candidate["metrics"]
    paired = evaluation.get("paired") or {}

    rules: list[Rule] = []
    if champion is not None and champion.get("version") is not None:
        rules.append(_is_new(candidate.get("version"), champion["version"], alias))
    rules.append(_better_than_base(policy, metrics, base["metrics"], paired.get("base")))
    theirs = champion["metrics"] if champion is not None else None
    rules.append(_not_worse_than_champion(policy, metrics, theirs, paired.get("champion"), alias))
    for index, limit in enumerate(policy.limits):
        rules.extend(_within(limit, index, metrics))
    rules.extend(_broken_numbers(metrics, {rule.metric for rule in rules}))

    failed = [rule for rule in rules if not rule.passed]
    return GateDecision(
        decision="hold" if failed else "promote",
        reasons=tuple(rule.text for rule in failed or rules),
        rules=tuple(rules),
        version=candidate.get("version"),
        champion=champion.get("version") if champion is not None else None,
        policy=policy,
    )


def _is_new(version: str | None, champion: str, alias: str) -> Rule:
    passed = version != champion
    text = (
        f"The candidate is a new version; {alias} points to {champion}."
        if passed
        else f"Nothing changed: the candidate is {champion}, the very version that {alias} points to now."
    )
    return Rule("new_version", "adapter.alias", None, None, None, None, passed, text)


def _better_than_base(
    policy: GateConfig, candidate: Mapping[str, Any], base: Mapping[str, Any], paired: Mapping[str, Any] | None
) -> Rule:
    metric, margin = policy.metric, policy.better_than_base_by
    ours, theirs = _finite(candidate.get(metric)), _finite(base.get(metric))
    if ours is None or theirs is None:
        passed = False
        text = _unmeasured(metric, candidate.get(metric), base.get(metric), "base model")
    else:
        gain = _improvement(metric, ours, theirs)
        passed = gain >= margin - ROUNDING
        text = (
            f"{_comparison(metric, ours, theirs, gain, 'the base model', margin)}; "
            f"it has to be better by at least {margin_text(metric, margin)}."
            f"{interval_text(metric, paired)}"
        )
    return Rule("better_than_base", "gate.better_than_base_by", metric, ours, theirs, margin, passed, text)


def _not_worse_than_champion(
    policy: GateConfig,
    candidate: Mapping[str, Any],
    champion: Mapping[str, Any] | None,
    paired: Mapping[str, Any] | None,
    alias: str,
) -> Rule:
    metric, tolerance = policy.metric, policy.worse_than_champion_by
    ours = _finite(candidate.get(metric))
    theirs = _finite(champion.get(metric)) if champion is not None else None
    if champion is None:
        passed = True
        text = f"The alias {alias} points to no version yet, so there is none that the candidate could be worse than."
    elif ours is None or theirs is None:
        passed = False
        text = _unmeasured(metric, candidate.get(metric), champion.get(metric), f"{alias} version")
    else:
        gain = _improvement(metric, ours, theirs)
        passed = gain >= -tolerance - ROUNDING
        allowed = f"be worse by at most {margin_text(metric, tolerance)}" if tolerance else "not be worse at all"
        text = (
            f"{_comparison(metric, ours, theirs, gain, alias, -tolerance)}; it may {allowed}."
            f"{interval_text(metric, paired)}"
        )
    return Rule("not_worse_than_champion", "gate.worse_than_champion_by", metric, ours, theirs, tolerance, passed, text)


def _within(limit: Limit, index: int, candidate: Mapping[str, Any]) -> Iterator[Rule]:
    metric = limit.metric
    ours = _finite(candidate.get(metric))
    for side, bound in (("min", limit.min), ("max", limit.max)):
        if bound is None:
            continue
        if ours is None:
            passed = False
            text = _unmeasured(metric, candidate.get(metric))
        else:
            passed = ours >= bound - ROUNDING if side == "min" else ours <= bound + ROUNDING
            text = _limit_text(metric, side, ours, bound, passed=passed)
        yield Rule(f"limit_{side}", f"gate.limits[{index}].{side}", metric, ours, None, bound, passed, text)


def _broken_numbers(candidate: Mapping[str, Any], compared: set[str | None]) -> Iterator[Rule]:
    """A NaN or an infinity in a metric that no rule compares still means that the evaluation cannot be trusted."""
    for metric, value in candidate.items():
        if metric in METRICS and metric not in compared and value is not None and _finite(value) is None:
            text = f"The candidate's {METRICS[metric].label} is {value}: the evaluation is not sound."
            yield Rule("finite_numbers", "evaluate", metric, None, None, None, False, text)


def _comparison(metric: str, ours: float, theirs: float, gain: float, other: str, margin: float) -> str:
    measure = METRICS[metric]
    amount = amount_text(metric, abs(gain), abs(margin))
    if abs(gain) < ROUNDING:
        how = f"the same as {other}'s"
    else:
        how = f"{'better' if gain > 0 else 'worse'} than {other}'s {value_text(metric, theirs, ours)} by {amount}"
    shown = f"{value_text(metric, ours, theirs)} {measure.unit}".rstrip()
    return f"The candidate's {measure.label} of {shown} is {how}"


def _limit_text(metric: str, side: str, ours: float, bound: float, *, passed: bool) -> str:
    shown = f"{value_text(metric, ours, bound)} {METRICS[metric].unit}".rstrip()
    demand = f"{'at least' if side == 'min' else 'at most'} {bound_text(metric, bound)} is required"
    if metric != "prompt_gain" or side != "min":
        direction = "within" if passed else "below" if side == "min" else "above"
        return f"The candidate's {METRICS[metric].label} of {shown} is {direction} the limit: {demand}."
    if passed:
        return (
            f"Answers depend on their prompts: seeing its own prompt instead of another record's helps by {shown}; "
            f"{demand}."
        )
    return (
        f"Answers do not depend on their prompts: seeing its own prompt instead of another record's helps by {shown}; "
        f"{demand}. Are prompts and answers shuffled or mislabelled in the data?"
    )


def _unmeasured(metric: str, candidate: object, other: object = 0.0, name: str = "") -> str:
    at_fault, value = ("candidate", candidate) if _finite(candidate) is None else (name, other)
    seen = "was not measured" if value is None else f"is {value}, not a finite number"
    return f"The {at_fault}'s {METRICS[metric].label} {seen}, so this rule cannot be checked and counts as failed."


def _improvement(metric: str, ours: float, theirs: float) -> float:
    """How much better ours is: positive when better, whichever way the metric runs."""
    return theirs - ours if METRICS[metric].lower_is_better else ours - theirs


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
