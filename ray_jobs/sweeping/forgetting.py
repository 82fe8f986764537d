"""How much a method forgets: the rise of the loss on general text from the base to the method's trained models."""

from collections.abc import Iterable, Sequence

import numpy as np

from components.records.sweep import Forgotten, Trial
from ray_jobs.sweeping.verdict import interval


def forgotten(ours: Sequence[Trial], trials: Iterable[Trial]) -> Forgotten | None:
    """The forgetting of one method's trainings `ours`, paired by passage and seed; None with fewer than two passages.

    The base's loss may come from any of the sweep's `trials`. A method's own base (LoftQ's) is no reference for
    forgetting, so the original base in the same format is used; where no trial used that, the original in another
    format.
    """
    after = [trial.general_text for trial in ours if trial.general_text]
    before = [trial.general_text for trial in trials if trial.general_text and "base" in trial.general_text.nll]
    if not after or not before or len(after[0].tokens) < 2:
        return None
    base = min(before, key=lambda each: each.base_format != after[0].base_format)
    tokens, base_nll_N = base.tokens, np.asarray(base.nll["base"])
    nll_KN = np.asarray([each.nll["candidate"] for each in after])
    rise, *ends = interval(nll_KN - base_nll_N, tokens)
    return Forgotten(
        base_format=base.base_format,
        base_loss=float(base_nll_N.sum() / sum(tokens)),
        losses=(nll_KN.sum(axis=1) / sum(tokens)).tolist(),
        rise=rise,
        ci95=(ends[0], ends[1]),
        passages=len(tokens),
    )
