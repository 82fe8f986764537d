"""The rule that the candidate is worse than the champion by no more than the margin; pure.

It allows for two things that the records do not show. The candidate need not match the part of the champion's lead that
is luck. It has to make up for the expected cost of losses that are rarer than those drawn.
"""

from typing import Any

from components.config.gate import GateConfig
from components.gate.comparisons import ROUNDING, Compared, at_most, not_worse, numbers
from components.gate.luck import luck_of
from components.records.steps import Lead, Measured, RuleResult
from components.shared.paired import few_unseen, much_worse_unseen


def not_worse_than_champion(
    policy: GateConfig, champion: Measured | None, compared: Compared, lead: Lead | None = None
) -> RuleResult:
    """Check that the candidate is sure to be worse than the champion by no more than the policy allows.

    The part of the champion's `lead` that is taken for luck does not count against the candidate.
    """
    tolerance = policy.worse_than_champion_by
    words: dict[str, Any] = {
        "name": "not_worse_than_champion",
        "field": "gate.worse_than_champion_by",
        "title": f"{compared.metric.title} not worse than {compared.called}'s",
    }
    if champion is None:
        text = (
            f"The alias {compared.called} points to no version yet, so there is none that the candidate could be worse "
            "than."
        )
        words["title"] = f"No version in {compared.called} to be worse than"
        parts = {**words, **numbers(compared), "bound": tolerance, "bound_text": at_most(compared, tolerance)}
        return RuleResult(**parts, passed=True, text=text)
    luck, unseen = _luck(compared, lead), _unseen(policy, compared)
    found = not_worse(
        compared,
        tolerance,
        luck=luck,
        unseen=unseen,
        **words,
        line_words=f", not to fall behind {compared.called}",
    )
    text = found.text
    if luck and lead is not None:
        text += (
            f" {compared.called.capitalize()} was chosen on these records: beside the {lead.decisions} candidates that "
            f"they judged, {_share(compared, luck)} of its lead is luck, which is not asked of this one."
        )
    if found.undecided and found.lower is not None and found.lower >= -tolerance - luck - ROUNDING:
        text += (
            f" Large losses are rare: beyond those drawn they are expected to cost {_share(compared, unseen)}, and the "
            "bound holds only without that."
        )
    return found.model_copy(update={"luck": luck or None, "unseen": unseen or None, "text": text})


def _luck(compared: Compared, lead: Lead | None) -> float:
    """The part of the champion's lead that is luck, in the unit of the gain."""
    found, theirs = compared.bounds if lead else None, compared.theirs
    if found is None or not theirs:
        return 0.0
    unit = abs(theirs) if compared.relative else 1.0
    return luck_of(lead, found.error * unit) / unit


def _unseen(policy: GateConfig, compared: Compared) -> float:
    """The expected cost of losses beyond those drawn; 0 unless the policy asks for rare losses to be seen."""
    pairs, found, theirs = compared.pairs, compared.bounds, compared.theirs
    if pairs is None or found is None or theirs is None or policy.much_worse_share == 1 or not compared.allows_for_rare:
        return 0.0
    of_the_tail = much_worse_unseen(pairs)
    if compared.revision == 0:
        return of_the_tail
    return max(of_the_tail, few_unseen(pairs, found, policy.rare_loss(theirs), compared.confidence))


def _share(compared: Compared, amount: float) -> str:
    return f"{compared.amounts.margin_text(amount)}{compared.of_theirs}"
