"""Secrets of single steps: here as on a cluster, only these steps get them, and no other process.

Steps that train or compare may run the code of a base, a metric or a task, which must not find a key to sign with.
"""

from collections.abc import Mapping
from itertools import chain
from typing import NamedTuple


class OwnSecrets(NamedTuple):
    """The environment variables that only one step is given."""

    kubernetes: Mapping[str, tuple[str, ...]]
    """Their names, by the Secret that holds them on a cluster."""
    prefixes: tuple[str, ...]
    """What is kept from other processes on this machine, such as the path of a key."""


def of_its_own() -> dict[str, OwnSecrets]:
    """Return each step's secrets by its name: who moves an alias signs and announces that, evaluate signs what was
    measured, report sends events to an OpenLineage server, and announces that no alias moved."""
    from components.handover import announce  # not at the top: `fineloop --help` imports this module's neighbours

    notify, of_nights = announce.secrets(), announce.secrets(of_nights=True)
    signing = ("FINELOOP_SIGNING_KEY", "FINELOOP_SIGNER")
    moves = OwnSecrets({"fineloop-promote": (*signing, *notify)}, ("FINELOOP_SIGN", *notify))
    evaluation = ("FINELOOP_EVALUATION_KEY", "FINELOOP_EVALUATION_SIGNER")
    measures = OwnSecrets({"fineloop-evaluate": evaluation}, ("FINELOOP_EVALUATION_",))
    return {
        "promote": moves,
        "move-by-hand": moves,
        "roll-back": moves,
        "check": measures,
        "evaluate": measures,
        "report": OwnSecrets(
            {"fineloop-report": ("OPENLINEAGE_API_KEY",), "fineloop-promote": of_nights}, ("OPENLINEAGE_", *of_nights)
        ),
    }


def of_step(name: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets of this step."""
    own = of_its_own().get(name)
    return {variable: value for variable, value in environment.items() if own and variable.startswith(own.prefixes)}


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the secrets of any step or tracker."""
    from components.config.schema import TRACKER_SECRETS

    own = [secrets.prefixes for secrets in of_its_own().values()]
    prefixes = tuple(chain(*own, *TRACKER_SECRETS.values()))
    return {name: value for name, value in environment.items() if not name.startswith(prefixes)}
