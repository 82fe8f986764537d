"""Secrets of single steps: these alone are given them, as on a cluster, and no other process that is started here.

What trains or compares may run the code of a base, a metric or a task, which must find no key there to sign with.
"""

from collections.abc import Mapping

OF_ITS_OWN = {
    "promote": ("FINELOOP_SIGN", "FINELOOP_WEBHOOK_SECRET", "FINELOOP_MODEL_REGISTRY_TOKEN", "MLFLOW_TRACKING_"),
    "report": ("OPENLINEAGE_",),
}
"""By a step's name, how the variables begin that it alone is given: promote signs and announces
the alias, report sends events to an OpenLineage server."""


def of_step(name: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The secrets of this step."""
    return {each: value for each, value in environment.items() if each.startswith(OF_ITS_OWN.get(name, ()))}


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the secrets of any step."""
    every = tuple(each for prefixes in OF_ITS_OWN.values() for each in prefixes)
    return {name: value for name, value in environment.items() if not name.startswith(every)}
