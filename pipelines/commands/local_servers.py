"""Answers that `fineloop store` and `fineloop ray` share, about a server of this machine."""

import argparse
import shlex
from collections.abc import Mapping

from pipelines.commands.arguments import Answer, home_option


def is_up(title: str, address: str, group: str, options: argparse.Namespace) -> str:
    """Return the text of `up`: how to use the server and how to stop it."""
    use = f'eval "$(fineloop {group} env{home_option(options)})"'
    return f"{title} is up at {address}, until `fineloop {group} down{home_option(options)}`; to use it: {use}"


def is_down(title: str, was_up: bool) -> Answer:
    """Return the answer of `down`."""
    return Answer({"stopped": was_up}, f"{title} {'has stopped' if was_up else 'was not up'}")


def exports(environment: Mapping[str, str]) -> Answer:
    """Return the answer of `env`: only lines for a shell's eval."""
    lines = (f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items()))
    return Answer(dict(environment), "\n".join(lines))
