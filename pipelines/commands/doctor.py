"""`fineloop doctor`."""

import argparse
from typing import Any

from pipelines.commands.arguments import Answer, add_command, add_config, add_home, load_config


def add(commands: Any) -> None:
    """Add the command."""
    doctor = add_command(
        commands,
        "doctor",
        _doctor,
        does="Say whether this machine can run Fineloop, and what to do where not.",
        more="It starts no server. A configured store is written to and read; what it wrote is removed again. How long "
        "a run of the config takes here is estimated by training a few layers of its base for a second or two.",
        example="fineloop doctor",
    )
    add_config(doctor)
    add_home(doctor)


def _doctor(options: argparse.Namespace) -> Answer:
    from pipelines.local.doctor import checks, time_of_a_run

    config = load_config(options)
    found = [*checks(options.home, registry=config.registry), time_of_a_run(config, options.home)]
    width = max(len(check.name) for check in found)
    lines = [
        f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {check.detail}{'' if check.ok else ': ' + check.fix}"
        for check in found
    ]
    is_well = all(check.ok for check in found)
    return Answer({"ok": is_well, "checks": [vars(check) for check in found]}, "\n".join(lines), 0 if is_well else 1)
