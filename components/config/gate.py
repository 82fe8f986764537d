"""When a candidate may take the alias, and whether what holds it is still good."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from components.config.section import Added, Section
from components.shared import binomial
from components.shared.metrics import COMPARED, MARKS, METRICS, OWN, metric_of

MUCH_WORSE = 1.5
"""Nats per answer token above the champion's loss from which a record counts as much worse."""
LARGE_LOSS = 2.0
"""Nats per token: rare losses of up to this size are allowed for."""
RARE_SHARE = 0.01
"""Share of records: much worse losses on this share must not go unnoticed."""
MAY_FORGET = 0.5
"""Nats per token of general text. The example, at five times the default rate, forgets 0.33, and 0.40 at most, at 95 %
(docs/evidence.md)."""
READS_GENERAL_TEXT = 5.0
"""Nats per token: a base with a larger loss on general text knows its languages too little to forget them."""
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
AnswerMetric = Annotated[str, AfterValidator(partial(_known, MARKS)), Field(json_schema_extra=_choices(MARKS))]


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
    """A further metric on which the candidate must not fall behind the champion."""

    metric: ComparedMetric
    """The metric that is watched."""
    worse_than_champion_by: Annotated[float, Field(ge=0)] | None = None
    """The candidate must be shown to be worse by at most this much, as with gate.worse_than_champion_by. Absent, it is
    held only if it is shown to be worse; where every record is right or wrong, by McNemar's exact test."""


class ApprovalConfig(Section):
    """When a person has to approve what every rule lets pass: `fineloop adapters approve`."""

    always: bool = False
    """Ask for each version of this adapter."""
    changed_answers_above: Annotated[float, Field(ge=0, le=1)] | None = None
    """Ask when more than this share of the answers to held-out records differs from the champion's. A first version
    changes all of them. Unset: do not ask."""


class GateConfig(Section):
    """When a candidate is promoted: when every rule passes. When the records do not show it either way, it is held."""

    metric: ComparedMetric = "loss"
    """Metric on which the candidate is compared with base and champion."""
    margins: Annotated[Literal["absolute", "relative"], Added("0.2.0")] = "absolute"
    """Unit of the margins on this metric: absolute is its own unit, relative a share of the other model's value
    (0.05 is 5 %). A margin on loss per token allows long answers more than short ones; relative margins and
    answer_loss do not."""
    better_than_base_by: float = 0.05
    """The candidate must be better than the base by at least this much."""
    worse_than_champion_by: Annotated[float, Field(ge=0)] = 0.02
    """The candidate may be worse than the champion by at most this much."""
    worse_than_best_by: Annotated[Annotated[float, Field(ge=0)] | None, Added("0.2.0")] = None
    """The candidate may be worse than the best version so far by at most this much, so that small losses do not add up.
    Each further decision on the same test set needs more confidence. Unset: 2.5 times worse_than_champion_by."""
    worse_on_general_text_by: Annotated[Annotated[float, Field(ge=0)] | None, Added("0.2.0")] = None
    """On general text (evaluate.general_passages) the candidate's loss may exceed the base's by at most this much,
    in nats per token. Unset: 0.5, which is no limit where no passages are read, or where the base's own loss on them
    is above 5 (its languages are others). An adapter that is served for its domain alone may forget more: 10 sets no
    limit."""
    lm_eval_worse_by: Annotated[dict[str, Annotated[float, Field(ge=0)]], Added("0.2.0")] = {}
    """By task of evaluate.lm_eval: the candidate's first metric there may not be shown to be worse than the base's by
    more than this; corrected for the number of tasks (Holm). {fineloop_json = 0.1} is ten points. Empty: no limit."""
    kl_from_base_at_most: Annotated[Annotated[float, Field(ge=0)] | None, Added("0.2.0")] = None
    """The candidate's KL divergence from its base on the base's own answers outside the domain
    (evaluate.own_answers) may be at most this, in nats per token. Unset: no limit."""
    much_worse_share: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Added("0.2.0")] = None
    """At most this share of records, or groups, may be worse than with the champion by more than 1.5 nats per
    answer token, shown with confidence (Clopper-Pearson); 1 sets no limit. Unset: no limit; but there must be
    enough records to contain a share of 0.01 at least once (299 of equal length), or with wider margins the share
    that would use up worse_than_champion_by at 2 nats per token each, or at 1 each of a metric from 0 to 1. Where
    every record is right or wrong, the bound sees to it."""
    confidence: Annotated[float, Field(ge=0.5, lt=1), Added("0.2.0")] = 0.95
    """Confidence of each comparison: at 0.95, a candidate that is worse than allowed passes about once in twenty times,
    and more often where losses are strongly skewed (docs/gate.md)."""
    min_records: Annotated[int, Field(ge=2), Added("0.2.0")] = 30
    """Smallest number of held-out records, or groups, to decide on. A run whose data hold out fewer ends before it
    trains."""
    guards: Annotated[list[Guard], Added("0.2.0")] = [Guard(metric="exact_match")]
    """Further metrics on which the candidate must not fall behind the champion."""
    slices: Annotated[list[SliceKind], Added("0.2.0")] = ["label", "source", "length"]
    """Slices by reference where references are classes, by the entry of data.source, by length of prompt and reference
    in thirds. In none of at least min_records may the candidate be shown to be worse than the champion by more than
    worse_than_best_by; corrected for their number (Holm)."""
    approval: Annotated[ApprovalConfig, Added("0.2.0")] = ApprovalConfig()
    """When a person has to approve."""
    limits: list[Limit] = [Limit(metric="answer_prompt_gain", min=0.3)]
    """Absolute bounds on the candidate's metrics. answer_prompt_gain (nats per answer) is how much better the
    candidate predicts an answer from its own prompt than from another record's; near zero means that answers do not
    depend on their prompts. Its minimum must be reached with confidence."""

    @model_validator(mode="after")
    def _relative_to_a_loss(self) -> "GateConfig":
        if self.margins == "relative" and not metric_of(self.metric).lower_is_better:
            losses = ", ".join(key for key in COMPARED if METRICS[key].lower_is_better)
            raise ValueError(
                f"margins relative to {self.metric} mean nothing where the base has none of it: set gate.metric to "
                f"{losses}, or gate.margins=absolute"
            )
        return self

    def rare_share(self, champion_loss: float) -> float:
        """The `much_worse_share` in force against a champion with this loss per token."""
        return self._rare_share(champion_loss) if self.much_worse_share is None else self.much_worse_share

    def rare_loss(self, champion_loss: float) -> float:
        """The loss of a record that is allowed for although it is rare, in the unit of `worse_than_champion_by`."""
        return self.worse_than_champion_by / self._rare_share(champion_loss)

    def records_to_replace(self, champion_loss: float = 1.0) -> int:
        """The fewest records that can replace a champion with this loss per token: of equal length, else of such an
        effective number (`Pairs.num_effective`). Where every record is right or wrong, fewer may do."""
        return binomial.least_without(self.rare_share(champion_loss), self.confidence)

    def _rare_share(self, champion_loss: float) -> float:
        """The share of records that uses up the margin if each loses all that it can, but RARE_SHARE at least."""
        metric, margin = metric_of(self.metric), self.worse_than_champion_by
        if metric.is_share:
            return min(1.0, max(RARE_SHARE, margin))
        if self.metric != "loss":
            return RARE_SHARE
        margin *= champion_loss if self.margins == "relative" else 1.0
        return min(1.0, max(RARE_SHARE, margin / LARGE_LOSS))

    @property
    def total_budget(self) -> float:
        return 2.5 * self.worse_than_champion_by if self.worse_than_best_by is None else self.worse_than_best_by


class CheckConfig(Section):
    """Whether what is in production is still good, on records that came since: `fineloop adapters check`."""

    against: Annotated[str, StringConstraints(min_length=1)] = "previous"
    """What production is compared with: previous is the version that a rollback returns to, or the base where there is
    none; base; or a version, such as a candidate that has not been promoted."""
    worse_by: Annotated[float, Field(gt=0)] | None = None
    """The drop to look for, in the unit of gate.metric, or with gate.margins=relative as a share. Unset:
    gate.worse_than_best_by."""
    roll_back: bool = False
    """Whether production goes back by itself where it is shown to be worse than the version that a rollback returns
    to."""
    when_skipped: bool = False
    """Whether a run that is skipped, because fewer than data.min_new_records came, checks production instead."""
