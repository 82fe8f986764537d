"""Confidence intervals of a loss, or of the difference of two, over the measured records and over seeds.

The mean is per answer token. Its variance is the sum of the variance over records (every seed has the same records)
and that over seeds (every record has the same seeds), as for two crossed samples; the residual
variance is part of both, so that the interval tends to be too wide. Degrees of freedom are Satterthwaite's.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95


def interval(nll_KN: npt.ArrayLike, tokens_N: npt.ArrayLike) -> tuple[float, float, float]:
    """Mean per token of K seeds on N records, and the two ends of its 95 % interval.

    With one seed it covers only the variation over records: another seed could have given a different result.
    """
    from scipy import stats

    nll, tokens = np.asarray(nll_KN, dtype=np.float64), np.asarray(tokens_N, dtype=np.float64)
    num_seeds, num_records = nll.shape
    of_seeds = nll.sum(axis=1) / tokens.sum()
    mean = float(of_seeds.mean())
    # Variance of a ratio of two sums, linearised.
    residuals = (nll.mean(axis=0) - mean * tokens) / tokens.mean()
    parts = [(residuals.var(ddof=1) / num_records, num_records - 1)]
    if num_seeds > 1:
        parts.append((of_seeds.var(ddof=1) / num_seeds, num_seeds - 1))
    variance = sum(part for part, _ in parts)
    if variance <= 0:
        return mean, mean, mean
    freedom = variance**2 / sum(part**2 / each for part, each in parts)
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom) * np.sqrt(variance))
    return mean, mean - reach, mean + reach


def paired_gain(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], tokens: Sequence[int]
) -> tuple[float, float, float]:
    """How much lower our loss is, paired by seed and by record, and the ends of its 95 % interval."""
    return interval(np.asarray(theirs) - np.asarray(ours), tokens)
