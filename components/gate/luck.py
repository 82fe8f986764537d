"""How much of the champion's lead is luck with the records that chose it; pure.

A champion took its place because it did well on the very records that later candidates are compared on, so on these it
looks better than it is, and an equal candidate looks worse: the winner's curse. Its measured score is shrunk towards
the recipe's scores in all decisions on these records, by the share of their scatter that is due to the records
(empirical Bayes: Efron, Tweedie's formula and selection bias, JASA 106, 2011; the share is estimated as in Morris, JASA
78, 1983). Measuring it again on records that did not choose it would take half of the records away from each decision.
"""

from collections.abc import Sequence

import numpy as np

from components.records.steps import Decision, Lead
from components.shared.metrics import metric_of

FEWEST = 8
"""The smallest number of decisions to estimate a scatter from."""


def lead_of(champion: str | None, metric: str, earlier: Sequence[Decision]) -> Lead | None:
    """The champion's lead over the candidates of `earlier` decisions on these records, given in their order.

    None if the champion is not among them, or they are fewer than FEWEST. The lead is the distance from a line fitted
    to all gains, because a recipe whose data grows gets better.
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
    """The part of the lead that is expected to be luck. `error` is the standard error of the candidate's gain over the
    champion.

    Two models were measured, so half of its square is the records' part in the variance of one model's score.
    """
    if lead is None or lead.gain <= 0 or lead.variance <= 0:
        return 0.0
    free = lead.decisions - 2
    return lead.gain * min(1.0, (free - 2) / free * error**2 / 2 / lead.variance)


def _gain_over_base(metric: str, decision: Decision) -> float | None:
    """The candidate's gain over the base, in the metric's own unit; the base was measured on the same records."""
    rule = next((each for each in decision.rules if each.name == "better_than_base"), None)
    if rule is None or rule.metric != metric or rule.candidate is None or rule.other is None:
        return None
    sign = -1.0 if metric_of(metric).lower_is_better else 1.0
    return sign * (rule.candidate - rule.other)
