"""Who works here, as the environment says it, or the machine."""

import contextlib
import os
import pwd
from collections.abc import Mapping

VARIABLE = "FINELOOP_USER"


def account(environment: Mapping[str, str]) -> str:
    """The name of the person or service: FINELOOP_USER where a deployment sets it, else the login, which cron and
    containers leave out of the environment; empty where the machine has no name for who runs this either."""
    if named := next((name for key in (VARIABLE, "USER", "LOGNAME") if (name := environment.get(key, ""))), ""):
        return named
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.getuid()).pw_name
    return ""
