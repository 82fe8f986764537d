"""Whether the candidate has forgotten what its base knows of text outside the domain, in words."""

import math

from components.report.run_files import RunFiles
from components.shared.metrics import metric_of

_LEAST = 0.005
"""The smallest rise of the loss that is reported as forgetting."""


def sentence(run: RunFiles) -> str:
    """The two sentences; empty if the loss on general text was not measured."""
    ours, base = run.metric("candidate", "general_loss"), run.metric("base", "general_loss")
    if ours is None or base is None:
        return ""
    metric = metric_of("general_loss")
    rise = ours - base
    if rise < _LEAST:
        found = f"Nothing shows as forgotten: on general text the candidate's loss is {metric.text(ours)}, "
        found += f"and the base's {metric.text(base)}."
    else:
        found = "The candidate has forgotten some of what the base knows: on general text its loss is "
        found += f"{metric.amount_text(rise)} higher, so that it gives the right token "
        found += f"{100 * (1 - math.exp(-rise)):.0f} % less chance."
    rule = next((each for each in (run.decision.rules if run.decision else ()) if each.metric == metric.key), None)
    if rule is None:
        return f"{found} No rule limits this; gate.worse_on_general_text_by would."
    kept = {"passed": "kept", "cannot tell": "neither shown to be kept nor to be broken"}.get(rule.short, "not kept")
    return f"{found} The gate's limit ({rule.bound_text}) is {kept}."
