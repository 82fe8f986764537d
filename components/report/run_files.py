"""What a finished, held, skipped or failed run left behind, as far as it got."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True)
class RunFiles:
    """Everything that a report is made of. Only the names are certain; the rest may be missing."""

    run_id: str
    adapter: str
    alias: str = "production"
    config_toml: str = ""
    config_digest: str = ""
    metrics: Sequence[Mapping[str, Any]] = ()
    """Records of metrics.jsonl."""
    evaluation: Mapping[str, Any] | None = None
    decision: Mapping[str, Any] | None = None
    steps: Sequence[Mapping[str, Any]] = ()
    """steps/*.json, in any order."""
    profile: Mapping[str, Any] | None = None
    lineage: Mapping[str, Any] | None = None
    generated_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def step(self, name: str) -> Mapping[str, Any] | None:
        """The record of one step, or None when it did not run."""
        return next((step for step in self.steps if step.get("step") == name), None)

    def model(self, role: str) -> Mapping[str, Any] | None:
        """The evaluation of `base`, `champion` or `candidate`, or None when it was not evaluated."""
        models = (self.evaluation or {}).get("models") or {}
        found: Mapping[str, Any] | None = models.get(role)
        return found

    def metric(self, role: str, name: str) -> float | None:
        """One number of the evaluation, or None when it was not measured or is not finite."""
        return finite(((self.model(role) or {}).get("metrics") or {}).get(name))

    @property
    def version(self) -> str | None:
        """The candidate's version, from the decision, the evaluation or what the finetune step said."""
        found = (
            (self.decision or {}).get("version")
            or (self.model("candidate") or {}).get("version")
            or self._result("finetune").get("version")
        )
        return str(found) if found else None

    @property
    def dataset_id(self) -> str | None:
        """The dataset, from the evaluation or from what the prepare step said."""
        found = (self.evaluation or {}).get("dataset_id") or self._result("prepare").get("dataset_id")
        return str(found) if found else None

    def _result(self, step: str) -> Mapping[str, Any]:
        return (self.step(step) or {}).get("result") or {}


def finite(value: object) -> float | None:
    """The value as a float, or None when it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    number = float(value)
    return number if number - number == 0 else None
