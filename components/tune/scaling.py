"""Estimates the best learning rate after rank, batch size or data have changed: advice, until a sweep measures it."""

import math
from collections.abc import Sequence

from components.config.schema import RunConfig
from components.registry.between_runs import FoundRate

SOURCE = "arXiv:2602.04998"
# In that paper LoRA's best rate fell 5.6 times from rank 4 to 256, rose 5.6 times from batches of 16 to 128, and fell
# 3.1 times from 5,000 records to 395,000. These are the slopes of straight lines on logarithmic axes.
PER_RANK = -math.log(5.6) / math.log(256 / 4)
PER_BATCH_SIZE = math.log(5.6) / math.log(128 / 16)
PER_RECORDS = -math.log(3.1) / math.log(395 / 5)
LEAST = math.log(10) / 4
"""The smallest change of the rate's logarithm that is worth advice: a quarter decade, a sweep's finest step."""


def advice(known: Sequence[FoundRate], config: RunConfig, train_records: int) -> str:
    """Advice on the rate: the one found in the most similar circumstances, moved along the paper's slopes. Empty if no
    rate is known, or it hardly moves."""
    moves = [(found, moved(found, config, train_records)) for found in known]
    found, move = min(moves, key=lambda each: sum(map(abs, each[1].values())), default=(None, {}))
    if found is None or abs(sum(move.values())) < LEAST:
        return ""
    times = math.exp(sum(move.values()))
    return (
        f"run {found.run_id} found {found.learning_rate:.3g}, and since then: {', '.join(move)}. By {SOURCE} LoRA's "
        f"best rate is then {times:.2g} times what it was, here about {found.learning_rate * times:.2g}"
    )


def moved(found: FoundRate, config: RunConfig, train_records: int) -> dict[str, float]:
    """The changes since a rate was found, in words, each with what it adds to the logarithm of the best rate."""
    circumstances = [
        ("rank", found.rank, config.method.r, PER_RANK),
        ("batches of", found.batch_size, config.train.batch_size, PER_BATCH_SIZE),
        ("records", found.train_records, train_records, PER_RECORDS),
    ]
    return {
        f"{what} {then:,} to {now:,}": slope * math.log(now / then)
        for what, then, now, slope in circumstances
        if then is not None and then != now
    }
