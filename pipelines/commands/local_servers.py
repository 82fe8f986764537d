"""What `fineloop store` and `fineloop ray` share: answers about a server of this machine."""

import argparse
import shlex
from collections.abc import Mapping

from pipelines.commands.arguments import Answer, home_option


def is_up(title: str, address: str, group: str, options: argparse.Namespace) -> str:
    """The answer of `up`: how to use the server and how to end it."""
    use = f'eval "$(fineloop {group} env{home_option(options)})"'
    return f"{title} is up at {address}, until `fineloop {group} down{home_option(options)}`; to use it: {use}"


def is_down(title: str, was_up: bool) -> Answer:
    """The answer of `down`."""
    return Answer({"stopped": was_up}, f"{title} {'has stopped' if was_up else 'was not up'}")


def exports(environment: Mapping[str, str]) -> Answer:
    """The answer of `env`: lines for a shell's eval, and nothing else."""
    lines = (f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items()))
    return Answer(dict(environment), "\n".join(lines))
