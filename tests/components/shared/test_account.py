"""The name in lineages and events is the one that `id` tells, where the environment tells none, as under cron."""

import subprocess

from components.shared.machine import account


def test_the_environment_names_who_works_here_and_else_the_machine_does():
    assert account({"FINELOOP_USER": "ann", "USER": "bob"}) == "ann"
    assert account({"USER": "", "LOGNAME": "bob"}) == "bob"
    assert account({}) == subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
