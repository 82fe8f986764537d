"""When a candidate may take the alias."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from components.config.section import Added, Section
from components.shared.metrics import COMPARED, METRICS, OWN, metric_of

SliceKind = Literal["label", "source", "length"]


def _known(metrics: Sequence[str], metric: str) -> str:
    if metric not in metrics and not re.fullmatch(OWN, metric):
        raise ValueError(f"{metric!r} is none of {', '.join(metrics)}, nor a function of your own as module:function")
    return metric


def _choices(metrics: Sequence[str]) -> dict[str, Any]:
    return {"anyOf": [{"enum": list(metrics)}, {"pattern": f"^{OWN}$"}]}


_ON_REQUEST = [key for key, metric in METRICS.items() if metric.on_request]
ComparedMetric = Annotated[str, AfterValidator(partial(_known, COMPARED)), Field(json_schema_extra=_choices(COMPARED))]
LimitedMetric = Annotated[
    str, AfterValidator(partial(_known, [*METRICS])), Field(json_schema_extra=_choices([*METRICS]))
]
RequestedMetric = Annotated[
    str, AfterValidator(partial(_known, _ON_REQUEST)), Field(json_schema_extra=_choices(_ON_REQUEST))
]


class Limit(Section):
    """An absolute bound on one of the candidate's metrics."""

    metric: LimitedMetric
    """The metric that is bounded."""
    min: float | None = None
    """Hold below this."""
    max: float | None = None
    """Hold above this."""

    @model_validator(mode="after")
    def _bounds_something(self) -> "Limit":
        if self.min is None and self.max is None:
            raise ValueError("a limit needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class Guard(Section):
    """A metric beside the one that decides, on which the candidate must not fall behind the champion."""

    metric: ComparedMetric
    """The metric that is watched."""
    worse_than_champion_by: Annotated[float, Field(ge=0)] | None = None
    """The candidate must be shown to be worse by at most this much, as with gate.worse_than_champion_by. Absent, it is
    held only when it is shown to be worse; where every record is right or wrong, by McNemar's exact test."""


class ApprovalConfig(Section):
    """When a person has to approve what every rule lets pass: `fineloop adapters approve`."""

    always: bool = False
    """Ask for each version of this adapter."""
    changed_answers_above: Annotated[float, Field(ge=0, le=1)] | None = None
    """Ask where more than this share of the answers to held-out records is another than the champion's. A first
    version changes everything. Absent asks nothing."""


class GateConfig(Section):
    """When a candidate may take the alias: when every rule passes. Where the records do not tell, it is held."""

    metric: ComparedMetric = "loss"
    """What base and champion are compared on."""
    margins: Annotated[Literal["absolute", "relative"], Added("0.2.0")] = "absolute"
    """What margins on this metric are in: its own unit, or a share of the other model's number, where 0.05 is 5 % of
    it. A loss per token allows long answers more than short ones; relative margins and answer_loss do not."""
    better_than_base_by: float = 0.05
    """The candidate must be better than the base by at least this much."""
    worse_than_champion_by: Annotated[float, Field(ge=0)] = 0.02
    """The candidate may be worse than the champion by at most this much."""
    worse_than_best_by: Annotated[Annotated[float, Field(ge=0)] | None, Added("0.2.0")] = None
    """In total, the candidate may be worse than the best version so far by at most this much, so that small steps down
    do not add up. Each further decision on one test set has to be surer of it. Absent means 2.5 times
    worse_than_champion_by."""
    worse_on_general_text_by: Annotated[Annotated[float, Field(ge=0)] | None, Added("0.2.0")] = None
    """On general text, which evaluate.general_passages measures, the candidate's loss may be above the base's by at
    most this, in nats per token: what the base knows must not be forgotten. Absent asks nothing: an adapter that is
    served for its domain alone may forget the rest, and how much is usual depends on the base and its languages."""
    suite_worse_by: Annotated[Annotated[float, Field(ge=0, lt=1)] | None, Added("0.2.0")] = None
    """In no suite of evaluate.suites may the candidate be shown to pass a smaller share of the items than the base, by
    more than this; the more suites there are, the surer each must be (Holm). 0.1 is ten points. Absent asks nothing."""
    kl_from_base_at_most: Annotated[Annotated[float, Field(ge=0)] | None, Added("0.2.0")] = None
    """How far the candidate may have moved from its base outside the domain: the KL divergence from the base on the
    base's own answers, of which evaluate.own_answers says how many, in nats per token. Absent asks nothing."""
    confidence: Annotated[float, Field(ge=0.5, lt=1), Added("0.2.0")] = 0.95
    """How sure each comparison must be: at 0.95, a candidate that is worse than allowed passes once in twenty times."""
    min_records: Annotated[int, Field(ge=2), Added("0.2.0")] = 30
    """Held-out records, or groups of them, without which nothing is decided."""
    too_few_records: Annotated[Literal["refuse", "hold"], Added("0.2.0")] = "refuse"
    """What becomes of a run whose data leaves fewer: refuse ends it with an error before it trains, hold trains all the
    same and holds what comes out."""
    guards: Annotated[list[Guard], Added("0.2.0")] = [Guard(metric="exact_match")]
    """Metrics beside the one that decides, each watched against the champion."""
    slices: Annotated[list[SliceKind], Added("0.2.0")] = ["label", "source", "length"]
    """Kinds of records that are each watched by themselves against the champion: by their reference where those are
    classes, by the entry of data.source that they come from, by the length of prompt and reference in thirds."""
    slice_worse_by: Annotated[Annotated[float, Field(ge=0)] | None, Added("0.2.0")] = None
    """In no slice of at least min_records may the candidate be shown to be worse than the champion by more than this;
    the more slices there are, the surer each must be (Holm). Absent means the same as for worse_than_best_by."""
    approval: Annotated[ApprovalConfig, Added("0.2.0")] = ApprovalConfig()
    """When a person has the last word."""
    limits: list[Limit] = [Limit(metric="answer_prompt_gain", min=0.3)]
    """Absolute bounds. answer_prompt_gain (nats per answer) is how much better the candidate predicts an answer from
    its own prompt than from another record's; near zero means that the answers do not depend on the prompts, whatever
    their length. It has to be as large for sure."""

    @model_validator(mode="after")
    def _relative_to_a_loss(self) -> "GateConfig":
        if self.margins == "relative" and not metric_of(self.metric).lower_is_better:
            losses = ", ".join(key for key in COMPARED if METRICS[key].lower_is_better)
            raise ValueError(
                f"margins relative to {self.metric} mean nothing where the base has none of it: set gate.metric to "
                f"{losses}, or gate.margins=absolute"
            )
        return self

    @property
    def slice_budget(self) -> float:
        """`slice_worse_by` in force."""
        return self.total_budget if self.slice_worse_by is None else self.slice_worse_by

    @property
    def total_budget(self) -> float:
        """`worse_than_best_by` in force."""
        return 2.5 * self.worse_than_champion_by if self.worse_than_best_by is None else self.worse_than_best_by
