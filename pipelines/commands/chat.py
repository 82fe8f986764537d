"""`fineloop chat`."""

import argparse
from typing import Any

from pipelines.commands.adapters import REFERENCE
from pipelines.commands.arguments import Answer, add_command, add_config, add_home
from pipelines.commands.opened_registry import opened_registry

# How often an idle OpenMP thread looks for work before it sleeps. By default it is some milliseconds, in which it keeps
# a processor from the thread that it waits for wherever others compute too; a token is several hundred such waits.
PATIENT_THREADS = {"GOMP_SPINCOUNT": "5000"}


def add(commands: Any) -> None:
    """Add the command."""
    chat = add_command(
        commands,
        "chat",
        _chat,
        does="Talk to an adapter, base and adapter side by side.",
        more="It reads messages from the terminal, one a line, and runs the adapter on its own base.",
        example="echo Mpox | fineloop chat icd10-chapters",
    )
    chat.add_argument("reference", metavar="NAME[@ALIAS|@VERSION]", help=REFERENCE)
    chat.add_argument(
        "--system",
        metavar="TEXT",
        help="a system message before each of yours; without it, the training data's, if all had the same",
    )
    add_config(chat)
    add_home(chat)


def _chat(options: argparse.Namespace) -> Answer:
    from components.registry.versions import resolve
    from pipelines.local.job import Job, talk

    with opened_registry(options) as store:
        version = resolve(store, options.reference)
        arguments = ["--version", f"{version.name}@{version.version}"]
        arguments += [] if options.system is None else ["--system", options.system]
        config = str(options.config.absolute())
        exit_code = talk(Job("ray_jobs.chat", config, arguments, options.overrides, PATIENT_THREADS))
    return Answer({"name": version.name, "version": version.version}, exit_code=exit_code)
