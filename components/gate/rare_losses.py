"""The rule on what a mean over a few hundred records cannot show: a small share of records that gets much worse; pure.

If one record in a hundred loses two nats a token, a draw of 240 contains none of them in one case of eleven, and no
bound of the mean shows the loss. So there have to be enough records to show such a share, by the exact binomial
distribution of their effective number: the longer an answer, the likelier it is to go wrong, and the more it weighs. A
share that was drawn counts in the mean's own bounds; a separate limit can be set for it.
"""

import math
from typing import Any

import numpy as np

from components.config.gate import GateConfig
from components.gate.comparisons import ROUNDING, Compared, unmeasured
from components.records.steps import RuleResult
from components.shared import binomial
from components.shared.counted import counted
from components.shared.metrics import metric_of


def few_get_much_worse(policy: GateConfig, compared: Compared) -> RuleResult | None:
    """Check that a share of records, or groups, that gets much worse than with the champion would be seen, and is
    within `gate.much_worse_share` if that is set, which limits losses alone. None if the policy asks for neither."""
    is_other = metric_of(policy.metric).column != compared.metric.column
    if is_other or policy.much_worse_share == 1 or not compared.allows_for_rare:
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
    independent, kind = pairs.num_independent, "record" if pairs.groups is None else "group"
    beyond = pairs.ours - pairs.theirs - policy.much_worse_by * pairs.weights
    of_each = beyond if pairs.groups is None else np.bincount(pairs.groups, weights=beyond)
    seen = int((of_each > 0).sum()) if is_limit else 0
    of = independent if is_limit or compared.revision == 0 else int(pairs.num_effective + ROUNDING)
    most, least = binomial.upper(seen, of, confidence), binomial.lower(seen, of, confidence)
    passed, failed = most <= share, least > share
    per_cent, sure = 100 * share, f"{confidence * 100:.6g} %"
    size = counted(independent, kind) + ("" if of == independent else f", which weigh as {of:,} of one length")
    if is_limit:
        text = (
            f"{seen} of {size} lose more than {policy.much_worse_by:.10g} nats per answer token against "
            f"{compared.called}'s. At least {100 * least:.3g} % and at most {100 * most:.3g} % of all {kind}s do, each "
            f"with {sure} confidence; {per_cent:.3g} % may."
        )
    elif passed:
        text = f"If {per_cent:.3g} % of all {kind}s got much worse, {size} would show some, with {sure} confidence."
    else:
        text = (
            f"Even if up to {100 * most:.3g} % of all {kind}s got much worse, {size} may show none, at {sure} "
            f"confidence; {per_cent:.3g} % may."
        )
    needed = None
    if not (passed or failed or seen):
        needed = math.ceil(binomial.least_of(0, share, confidence) * independent / of)
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
