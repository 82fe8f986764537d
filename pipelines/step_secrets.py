"""Secrets of single steps: here as on a cluster, only these steps get them, and no other process.

Steps that train or compare may run the code of a base, a metric or a task, which must not find a key to sign with.
"""

from collections.abc import Mapping
from typing import NamedTuple


class OwnSecrets(NamedTuple):
    """The environment variables that only one step is given."""

    kubernetes: str
    """Name of the Secret that holds them on a cluster."""
    names: tuple[str, ...]
    prefixes: tuple[str, ...]
    """On this machine, whatever begins so is kept from other processes, such as the path of a key."""


def of_its_own() -> dict[str, OwnSecrets]:
    """Return each step's secrets by its name: who moves an alias signs and announces that, evaluate signs what was
    measured, report sends events to an OpenLineage server."""
    from components.promote import announce  # not at the top: `fineloop --help` imports this module's neighbours

    told = announce.secrets()
    moves = OwnSecrets("fineloop-promote", ("FINELOOP_SIGNING_KEY", "FINELOOP_SIGNER", *told), ("FINELOOP_SIGN", *told))
    evaluation = ("FINELOOP_EVALUATION_KEY", "FINELOOP_EVALUATION_SIGNER")
    return {
        "promote": moves,
        "move-by-hand": moves,
        "evaluate": OwnSecrets("fineloop-evaluate", evaluation, ("FINELOOP_EVALUATION_",)),
        "report": OwnSecrets("fineloop-report", ("OPENLINEAGE_API_KEY",), ("OPENLINEAGE_",)),
    }


def of_step(name: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets of this step."""
    own = of_its_own().get(name)
    return {each: value for each, value in environment.items() if own and each.startswith(own.prefixes)}


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the secrets of any step or tracker."""
    from components.config.schema import TRACKER_SECRETS

    own = [each.prefixes for each in of_its_own().values()]
    every = tuple(prefix for prefixes in (*own, *TRACKER_SECRETS.values()) for prefix in prefixes)
    return {name: value for name, value in environment.items() if not name.startswith(every)}
