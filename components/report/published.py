"""A version as the registry's page shows it, with what its run measured and decided."""

from dataclasses import dataclass

from components.records.steps import Decision, Evaluation, RuleResult
from components.registry.versions import Version
from components.report.html import when
from components.shared.metrics import RELATIVE, Metric, is_metric, metric_of


def against_champion(decision: Decision) -> RuleResult | None:
    """The rule that compared the candidate with the champion and set a bound at least; None where there was none."""
    rules = (rule for rule in decision.rules if rule.name == "not_worse_than_champion")
    return next((rule for rule in rules if (rule.lower, rule.upper) != (None, None)), None)


@dataclass(frozen=True)
class Gain:
    """How much better a version was than what was in production when the two were compared."""

    metric: Metric
    amounts: Metric
    """The metric whose format the numbers have."""
    gain: float
    lower: float | None
    upper: float | None
    confidence: float | None
    """Confidence of each bound, if the gate set them; None for an evaluation's 95 % interval."""

    @property
    def bounds_text(self) -> str:
        """The bounds in words; empty where there are none."""
        if self.lower is None and self.upper is None:
            return ""
        if self.confidence is not None:
            return f"the gain lies {self.amounts.range_text(self.lower, self.upper, confidence=self.confidence)}"
        if self.lower is None or self.upper is None:
            return ""
        return (
            f"the 95 % interval of the gain is {' to '.join(map(self.amounts.signed_text, (self.lower, self.upper)))}"
        )

    @property
    def excludes_zero(self) -> bool:
        """Whether a bound shows that there is a difference."""
        return (self.lower is not None and self.lower > 0) or (self.upper is not None and self.upper < 0)


@dataclass(frozen=True)
class Published:
    """A version with what its run measured."""

    version: Version
    evaluation: Evaluation | None
    decision: Decision | None = None

    @property
    def published(self) -> str:
        return when(self.version.created_at)

    def metric(self, key: str) -> str:
        """Return the candidate's metric as text; a dash if it was not measured."""
        value = self.evaluation.metric("candidate", key) if self.evaluation else None
        return "-" if value is None else metric_of(key).text(value)

    @property
    def against_champion(self) -> Gain | None:
        """The gain as the gate judged it, so that the page and the run's report agree; otherwise as evaluated."""
        rule = against_champion(self.decision) if self.decision else None
        if rule is not None and is_metric(rule.metric) and rule.gain is not None:
            amounts = RELATIVE if rule.relative else metric_of(rule.metric)
            return Gain(metric_of(rule.metric), amounts, rule.gain, rule.lower, rule.upper, rule.confidence)
        found = self.evaluation.paired.get("champion") if self.evaluation else None
        if found is None or not is_metric(found.metric):
            return None
        metric, (low, high) = metric_of(found.metric), found.ci95 or (None, None)
        return Gain(metric, metric, found.difference, low, high, None)
