"""Who works here, as the environment says it."""

from collections.abc import Mapping

VARIABLE = "FINELOOP_USER"


def account(environment: Mapping[str, str]) -> str:
    """The name of the person or service: FINELOOP_USER where a deployment sets it, else the login; empty without."""
    return next((name for key in (VARIABLE, "USER", "LOGNAME") if (name := environment.get(key, ""))), "")
