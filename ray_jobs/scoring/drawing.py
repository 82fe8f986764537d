"""The results on held-out records, and how many more records a decision needs; pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from components.config.gate import GateConfig
from components.config.schema import RunConfig
from components.prepare.dataset import Record
from components.records.steps import Role
from components.shared.paired import Pairs, bounds, records_to_decide
from ray_jobs.kernels.door import Kernels
from ray_jobs.scoring.answers import Score, pairs_of
from ray_jobs.scoring.measure import ShardResult
from ray_jobs.scoring.probe import Findings

CLEAR = 0.999
"""Confidence at which an interim result needs no more records: a single look at such a high level hardly changes the
error rate (the Haybittle-Peto boundary, British Journal of Cancer 34, 1976)."""


def records_wanted(policy: GateConfig, compared: Mapping[Role, Pairs]) -> int:
    """Number of records at which a candidate as good as champion and anchor (the best version) passes the gate with a
    power of 80 %; 0 where the records at hand decide.

    It depends on how much the models differ from record to record, not on which is ahead, so that looking before
    drawing more favours no verdict (Wittes and Brittain, Statistics in Medicine 9, 1990: an internal pilot).
    """
    margins: dict[Role, float] = {"champion": policy.worse_than_champion_by, "anchor": policy.total_budget}
    wanted = 0
    for role, margin in margins.items():
        pairs = compared.get(role)
        found = bounds(pairs, CLEAR) if pairs and margin else None
        if found is None or found.upper < -margin:
            continue
        if role == "champion" and pairs is not None and not pairs.are_binary:
            least = policy.records_to_replace(float(pairs.theirs.sum() / pairs.weights.sum()))
            lacking = least / pairs.num_effective
            wanted = max(wanted, math.ceil(found.records * lacking) if lacking > 1 else 0)
        if found.lower >= -margin:
            continue
        wanted = max(wanted, records_to_decide(replace(found, gain=0.0), -margin, policy.confidence) or 0)
    return wanted


@dataclass(frozen=True)
class Found:
    """The results on the records that fit every contender's context."""

    kernels: Kernels
    records: list[Record]
    tokens: list[int]
    scores: dict[Role, list[Score]]
    shares: list[dict[str, Findings]]
    """The probes' findings on each share, by the probes' keys."""
    first_scored_at: str
    """Time at which the first batch was scored, ISO 8601 in UTC."""

    @classmethod
    def of(cls, kernels: Kernels, shards: Sequence[Sequence[Record]], results: Sequence[ShardResult]) -> "Found":
        """Join the results of the workers, one for each shard of records."""
        return cls(
            kernels,
            [each for shard, result in zip(shards, results, strict=True) for each in shard if each.id in result.tokens],
            [count for result in results for count in result.tokens.values()],
            {role: [score for result in results for score in result.scores[role]] for role in results[0].scores},
            [share for result in results for share in result.shares],
            min(result.first_scored_at for result in results),
        )

    def and_then(self, more: "Found") -> "Found":
        """These results with the records and scores of `more` appended; its probes are not."""
        return replace(
            self,
            records=self.records + more.records,
            tokens=self.tokens + more.tokens,
            scores={role: scores + more.scores[role] for role, scores in self.scores.items()},
        )


def further(config: RunConfig, left: Sequence[Record], found: Found) -> Sequence[Record]:
    """The remaining records to measure as well: as many as a decision needs, up to `evaluate.max_records` in all."""
    policy, groups = config.gate, [record.group for record in found.records]
    compared = {
        role: pairs_of(
            found.scores["candidate"],
            found.scores[role],
            found.tokens,
            policy.metric,
            groups,
            relative=policy.margins == "relative",
        )
        for role in found.scores
        if role not in ("candidate", "base")
    }
    wanted = min(records_wanted(policy, compared), config.evaluate.max_records) - len(found.records)
    # A single record is not enough: its answer is also scored behind another record's prompt.
    return left[:wanted] if min(wanted, len(left)) > 1 else ()
