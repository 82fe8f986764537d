"""Secrets of single steps. As on a cluster, only these steps get them, and no other process that is started here.

Steps that train or compare may run the code of a base, a metric or a task, which must not find a key to sign with.
"""

from collections.abc import Mapping

OF_ITS_OWN = {
    "promote": ("FINELOOP_SIGN", "FINELOOP_WEBHOOK_SECRET", "FINELOOP_MODEL_REGISTRY_TOKEN", "MLFLOW_TRACKING_"),
    "report": ("OPENLINEAGE_",),
}
"""Prefixes of the variables that only one step is given, by the step's name: promote signs and announces the alias,
report sends events to an OpenLineage server."""


def of_step(name: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets of this step."""
    return {each: value for each, value in environment.items() if each.startswith(OF_ITS_OWN.get(name, ()))}


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the secrets of any step."""
    every = tuple(each for prefixes in OF_ITS_OWN.values() for each in prefixes)
    return {name: value for name, value in environment.items() if not name.startswith(every)}
