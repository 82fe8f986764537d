"""The rule on slices of the held-out records: an unchanged mean may hide that one kind of record got worse; pure."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from components.config.gate import GateConfig
from components.gate import holm
from components.gate.comparisons import ROUNDING, Compared, unmeasured
from components.records.steps import RuleResult, SliceResult
from components.shared.paired import Bounds, Pairs, bounds


@dataclass(frozen=True)
class Slice:
    """The compared records that one kind of slice puts under the same name."""

    kind: str
    name: str
    pairs: Pairs


def no_slice_is_worse(policy: GateConfig, compared: Compared) -> RuleResult | None:
    """Check that no slice shows the candidate worse than the champion by more than allowed; None without slices.

    A slice of fewer records than `gate.min_records` is not judged. All of them together have one error rate, by Holm's
    procedure (Scandinavian Journal of Statistics 6, 1979): the more slices, the more confidence each needs.
    """
    found = list(_slices(policy, compared))
    if not found:
        return None
    margin, metric = policy.slice_budget, compared.metric
    allowed = f"{compared.amounts.margin_text(margin)}{compared.of_theirs}"
    level = holm.level(policy.confidence, len(found))
    at_once = [bounds(each.pairs, level) for each in found]
    worse = _shown_worse(found, at_once, margin, policy.confidence)
    results = [
        _result(part, between, worse=index in worse)
        for index, (part, between) in enumerate(zip(found, at_once, strict=True))
        if between is not None
    ]
    results.sort(key=lambda each: each.gain)
    measured = len(results) == len(found)
    return RuleResult(
        name="slices",
        field="gate.slices",
        title="No kind of record gets worse",
        metric=metric.key,
        against=compared.against,
        bound=margin,
        bound_text=f"in no slice shown to be worse by more than {allowed}",
        confidence=level,
        relative=compared.relative,
        slices=tuple(results),
        passed=measured and not worse,
        text=_text(results, compared, allowed) if measured else unmeasured(compared),
    )


def _slices(policy: GateConfig, compared: Compared) -> Iterator[Slice]:
    pairs = compared.pairs
    if pairs is None:
        return
    for kind in policy.slices:
        of_records = compared.evidence.slices.get(kind)
        names = () if of_records is None else np.unique(of_records)
        for name in names if len(names) > 1 else ():
            part = pairs.where(of_records == name)
            if part.num_independent >= policy.min_records:
                yield Slice(kind, str(name), part)


def _shown_worse(
    parts: Sequence[Slice], at_once: Sequence[Bounds | None], margin: float, confidence: float
) -> set[int]:
    first = holm.level(confidence, len(parts))

    def shows(index: int, level: float) -> bool:
        between = at_once[index] if level == first else bounds(parts[index].pairs, level)
        return between is not None and between.upper < -margin - ROUNDING

    return holm.found(len(parts), confidence, shows)


def _result(part: Slice, found: Bounds, *, worse: bool) -> SliceResult:
    return SliceResult(
        kind=part.kind,
        name=part.name,
        records=found.records,
        gain=found.gain,
        lower=_finite(found.lower),
        upper=_finite(found.upper),
        worse=worse,
    )


def _finite(bound: float) -> float | None:
    """The bound; None if the slice's records are so few, or so alike, that some resamples have no spread."""
    return bound if math.isfinite(bound) else None


def _text(results: Sequence[SliceResult], compared: Compared, allowed: str) -> str:
    metric, called, worse = compared.metric, compared.called, [each for each in results if each.worse]

    def described(each: SliceResult) -> str:
        lies = compared.amounts.range_text(each.lower, each.upper)
        return f"{each.kind} {each.name!r} ({each.records} records, gain {lies})"

    if worse:
        return (
            f"The candidate's {metric.label} is worse than {called}'s by more than {allowed} in {len(worse)} of "
            f"{len(results)} slices of the records: {'; '.join(map(described, worse))}."
        )
    return (
        f"In none of {len(results)} slices of the records is the candidate's {metric.label} shown to be worse than "
        f"{called}'s by more than {allowed}; lowest is {described(results[0])}."
    )
