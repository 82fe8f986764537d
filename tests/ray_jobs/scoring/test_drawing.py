import math

import numpy as np
import pytest

from components.config import config_file
from components.config.gate import GateConfig
from components.prepare.dataset import Message, Record
from components.shared.paired import Pairs
from ray_jobs.scoring.answers import Score
from ray_jobs.scoring.measure import ShardResult, further, merged, records_wanted

Z = 1.6449 + 1.6449
"""Normal quantiles of the confidence and of the power, 95 % each."""


def pairs(gain: float, deviation: float, records: int = 300) -> Pairs:
    values = np.random.default_rng(0).standard_normal(records)
    gains = gain + deviation * (values - values.mean()) / values.std(ddof=1)
    return Pairs(1.0 - gains, np.ones(records), np.ones(records), lower_is_better=True)


@pytest.mark.parametrize("gain", [0.0, 0.01, -0.025])
def test_what_is_wanted_depends_on_how_records_differ_and_not_on_who_is_ahead(gain: float) -> None:
    """By the usual formula for a mean: (z + z)^2 variance / margin^2."""
    assert records_wanted(GateConfig(), {"champion": pairs(gain, 0.3)}) == pytest.approx((Z * 0.3 / 0.02) ** 2, abs=11)


def test_what_is_clear_beyond_doubt_wants_no_more() -> None:
    far = 3.3 * 0.3 / math.sqrt(300)
    assert records_wanted(GateConfig(), {"champion": pairs(-0.02 + far, 0.3)}) == 0
    assert records_wanted(GateConfig(), {"champion": pairs(-0.02 - far, 0.3)}) == 0
    assert records_wanted(GateConfig(), {"base": pairs(0.0, 0.3)}) == 0
    assert records_wanted(GateConfig(worse_than_champion_by=0.0), {"champion": pairs(0.0, 0.3)}) == 0


def test_the_best_version_so_far_is_asked_for_too() -> None:
    both = {"champion": pairs(1.0, 0.3), "anchor": pairs(0.0, 0.6)}
    assert records_wanted(GateConfig(), both) == pytest.approx((Z * 0.6 / 0.05) ** 2, abs=11)


def test_nothing_is_wanted_of_numbers_that_are_not_finite() -> None:
    broken = Pairs(np.array([1.0, math.nan]), np.ones(2), np.ones(2))
    assert records_wanted(GateConfig(), {"champion": broken}) == 0


def measured(records: list[Record], deviation: float) -> ShardResult:
    """By two workers, of which each has every second record; one record was too long for a model."""
    random = np.random.default_rng(0)
    shards = [records[start::2] for start in range(2)]
    results = [
        ShardResult(
            {record.id: 2 for record in shard if record.id != "r5"},
            {
                role: [
                    Score(2 * (1.0 + spread * value), None, record.id, {})
                    for record, value in zip(shard, random.standard_normal(len(shard)), strict=True)
                    if record.id != "r5"
                ]
                for role, spread in (("base", 0.0), ("champion", 0.0), ("candidate", deviation))
            },
            [],
            "2026-11-26T12:00:00+00:00",
            "float32",
        )
        for shard in shards
    ]
    return merged(results)


def test_more_records_are_drawn_up_to_what_tells_what_is_allowed_and_what_there_is(config) -> None:
    held_out = [Record(f"r{number}", [Message("user", "q")], "a") for number in range(900)]
    found = measured(held_out[:300], 0.15)
    assert [score.text for score in found.scores["candidate"]] == [record.id for record in found.order(held_out)]
    assert len(found.tokens) == 299

    def drawn(most: int, left: list[Record] = held_out[300:]) -> int:
        allowed = config_file.loads(config_file.dumps(config), [f"evaluate.max_records={most}"])
        more = further(allowed, held_out[:300], left, found)
        assert list(more) == left[: len(more)]
        return len(more)

    needed = (Z * 0.15 / 0.02) ** 2
    assert drawn(1000) == pytest.approx(needed - 299, abs=0.15 * needed)
    assert drawn(320) == 21
    assert drawn(1000, held_out[300:310]) == 10
    assert drawn(0) == drawn(300) == drawn(1000, held_out[300:301]) == 0


def test_what_was_drawn_later_stands_behind_what_was_first() -> None:
    first, later = ([Record(f"{name}{i}", [Message("user", "q")], "a") for i in range(6)] for name in "rs")
    both = merged([measured(first, 0.1), measured(later, 0.1)])
    assert [*both.tokens] == ["r0", "r2", "r4", "r1", "r3", "s0", "s2", "s4", "s1", "s3", "s5"]
    assert [score.text for score in both.scores["champion"]] == [*both.tokens]
