"""How much of the champion's lead is the luck of the records that chose it; pure.

A champion took its place because it did well on the very records that later candidates are compared on, so on these it
looks better than it is, and an equal candidate looks worse: the winner's curse. Its measured score is shrunk towards
what the recipe gave in all decisions on these records, by the share of their scatter that is the records' (empirical
Bayes: Efron, Tweedie's formula and selection bias, JASA 106, 2011; the share as Morris, JASA 78, 1983, estimates it).
To measure it anew on records that did not choose it would take half of them away from each decision.
"""

from collections.abc import Sequence

import numpy as np

from components.records.steps import Decision, Lead
from components.shared.metrics import metric_of

FEWEST = 8
"""Decisions that a scatter is taken from."""


def lead_of(champion: str | None, metric: str, earlier: Sequence[Decision]) -> Lead | None:
    """How the champion stood among the candidates of `earlier` decisions on these records, in their order.

    None where they did not choose it, or are too few. It is the distance from a line through all, as a recipe whose
    data grow gets better.
    """
    found = [(each.version, gain) for each in earlier if (gain := _gain_over_base(metric, each)) is not None]
    place = max((index for index, (version, _) in enumerate(found) if version == champion), default=None)
    if place is None or len(found) < FEWEST:
        return None
    nights, gains = np.arange(len(found)), np.array([gain for _, gain in found])
    above = gains - np.polyval(np.polyfit(nights, gains, 1), nights)
    free = len(found) - 2
    return Lead(gain=float(above[place]), variance=float(above @ above) / free, decisions=len(found))


def luck_of(lead: Lead | None, error: float) -> float:
    """What to expect of the lead to be luck, where the candidate's gain over the champion has this standard error.

    Half of its square is the records' part in the variance of one model's score, as two were measured.
    """
    if lead is None or lead.gain <= 0 or lead.variance <= 0:
        return 0.0
    free = lead.decisions - 2
    return lead.gain * min(1.0, (free - 2) / free * error**2 / 2 / lead.variance)


def _gain_over_base(metric: str, decision: Decision) -> float | None:
    """In the metric's own unit; the base was measured on the same records."""
    rule = next((each for each in decision.rules if each.name == "better_than_base"), None)
    if rule is None or rule.metric != metric or rule.candidate is None or rule.other is None:
        return None
    sign = -1.0 if metric_of(metric).lower_is_better else 1.0
    return sign * (rule.candidate - rule.other)
