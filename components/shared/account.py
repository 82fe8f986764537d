"""The account that runs this process, from the environment or the machine."""

import contextlib
import os
import pwd
from collections.abc import Mapping

VARIABLE = "FINELOOP_USER"


def account(environment: Mapping[str, str]) -> str:
    """The name of the person or service: FINELOOP_USER if a deployment sets it, else the login. Cron and containers
    leave the login out of the environment, so the machine is asked for it; empty if it knows no name either."""
    if named := next((name for key in (VARIABLE, "USER", "LOGNAME") if (name := environment.get(key, ""))), ""):
        return named
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.getuid()).pw_name
    return ""
