"""How sure a loss, or a difference of two, is: over the records that it was measured on, and over seeds.

The mean is that of answer tokens. Its variance is the sum of that of records (each seed meets the same ones) and that
of seeds (each record meets the same ones), as for two crossed samples; what is left of chance lies in both, so that the
interval errs on the wide side. Degrees of freedom are Satterthwaite's.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95


def interval(nll_KN: npt.ArrayLike, tokens_N: npt.ArrayLike) -> tuple[float, float, float]:
    """Mean per token of K seeds on N records, and the two ends of its 95 % interval.

    Of one seed it is over records alone: another training could have come out otherwise.
    """
    from scipy import stats

    nll, tokens = np.asarray(nll_KN, dtype=np.float64), np.asarray(tokens_N, dtype=np.float64)
    num_seeds, num_records = nll.shape
    of_seeds = nll.sum(axis=1) / tokens.sum()
    mean = float(of_seeds.mean())
    # A ratio of two sums, linearised.
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
    """How much lower our loss is, seed by seed and record by record, with the ends of its interval."""
    return interval(np.asarray(theirs) - np.asarray(ours), tokens)
