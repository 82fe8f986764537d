"""The rule on what a mean over a few hundred records cannot show: a small share of records that gets much worse; pure.

If one record in a hundred loses two nats a token, a draw of 240 contains none of them in one case of eleven, and no
bound of the mean shows the loss. So there have to be enough records to show such a share, by the exact binomial
distribution. A share that was drawn counts in the mean's own bounds; a separate limit can be set for it.
"""

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from components.config.gate import GateConfig
from components.gate.comparisons import Compared, unmeasured
from components.records.steps import RuleResult
from components.shared import binomial
from components.shared.counted import counted
from components.shared.metrics import metric_of
from components.shared.paired import MANY_RECORDS, Pairs


def few_get_much_worse(policy: GateConfig, compared: Compared) -> RuleResult | None:
    """Check that a share of records, or groups, that gets much worse than with the champion would be seen, and is
    within `gate.much_worse_share` if that is set. None if the policy asks for neither, or compares by no loss."""
    if metric_of(policy.metric).column != compared.metric.column or policy.much_worse_share == 1:
        return None
    words: dict[str, Any] = {
        "name": "much_worse",
        "field": "gate.much_worse_share",
        "title": "Few records get much worse",
        "metric": compared.metric.key,
        "against": compared.against,
        "confidence": compared.confidence,
    }
    pairs, theirs, confidence = compared.pairs, compared.theirs, compared.confidence
    if pairs is None or theirs is None or not np.isfinite([pairs.ours, pairs.theirs]).all():
        return RuleResult(**words, passed=False, text=unmeasured(compared))
    share, is_limit = policy.rare_share(theirs), policy.much_worse_share is not None
    seen, of = much_worse(pairs, policy.much_worse_by), pairs.num_independent
    judged = seen if is_limit else 0
    most, least = binomial.upper(judged, of, confidence), binomial.lower(judged, of, confidence)
    passed, failed = most <= share, least > share
    kind, per_cent, sure = "record" if pairs.groups is None else "group", 100 * share, f"{confidence * 100:.6g} %"
    text = (
        f"{seen} of {counted(of, kind)} lose more than {policy.much_worse_by:.10g} nats per answer token against "
        f"{compared.called}'s. "
    )
    if is_limit:
        text += f"At least {100 * least:.3g} % and at most {100 * most:.3g} % of all {kind}s do, each with {sure} "
        text += f"confidence; {per_cent:.3g} % may."
    elif passed:
        text += f"A share of {per_cent:.3g} % that does would be seen with {sure} confidence, and weighs in the mean."
    else:
        text += f"A share of up to {100 * most:.3g} % may do so unseen, at {sure} confidence; {per_cent:.3g} % may."
    needed = None if passed or failed else records_needed(judged, of, share, confidence)
    if needed is not None:
        text += f" {needed} {kind}s would tell (evaluate.records gave {compared.evaluation.records})."
    return RuleResult(
        **words,
        bound=share,
        bound_text=f"at most {per_cent:.3g} % of {kind}s{'' if is_limit else ' unseen'}",
        passed=passed,
        undecided=not (passed or failed),
        records_needed=needed,
        text=text,
    )


def much_worse(pairs: Pairs, by: float) -> int:
    """How many records, or groups, lose more than `by` per token."""
    beyond = pairs.ours - pairs.theirs - by * pairs.weights
    return int(((beyond if pairs.groups is None else np.bincount(pairs.groups, weights=beyond)) > 0).sum())


def records_needed(seen: int, of: int, share: float, confidence: float) -> int | None:
    """How many records would decide it if the same share of them gets much worse; None if that share is too large."""
    least = binomial.least_of(seen, share, confidence)
    if not seen:
        return least
    distance, error = share - seen / of, NormalDist().inv_cdf(confidence) * math.sqrt(share * (1 - share))
    if distance <= 0 or error**2 >= MANY_RECORDS * distance**2:
        return None
    return max(least, 10 * math.ceil((error / distance) ** 2 / 10))
