"""`fineloop run`, and what `fineloop train` shares with it."""

import argparse
import os
import shutil
import sys
from typing import Any, Literal

from pipelines.commands.arguments import Answer, add_command, add_config, add_home, add_note, home_option, load_config


def add(commands: Any) -> None:
    """Add the command."""
    run = add_command(
        commands,
        "run",
        _run,
        does="Run the whole pipeline on this machine.",
        more="It prepares the data, fine-tunes an adapter, compares it with the base model and with the version in "
        "production, and promotes it if the gate passes it. With no options it runs the built-in example; a second "
        "run in the same home is compared with the first one's version.",
        example="fineloop run -c pipelines/configs/icd10.toml --set train.learning_rate=5e-4",
    )
    add_run_options(run)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What runs, where its files lie, and its name."""
    add_config(parser)
    add_home(parser)
    add_note(parser)
    parser.add_argument("--run-id", default="", metavar="ID", help="name of the run (default: its time)")


def _run(options: argparse.Namespace) -> Answer:
    return run_here(options, "retrain")


def run_here(options: argparse.Namespace, what: Literal["retrain", "train"], *, address: str = "") -> Answer:
    """Run it on this machine to its end; a person watches on stderr."""
    from pipelines.local.outcome import summary
    from pipelines.local.run import Place, run

    config = load_config(options)
    place = Place(options.home, sys.stderr, verbose=options.verbose, address=address)
    outcome = run(config, place, what=what, run_id=options.run_id)
    text = summary(outcome, home_option=home_option(options), program=_program())
    return Answer(outcome.as_json(), text, is_aside=True)


def _program() -> str:
    """What a person types to call us again: `make run` runs us from a virtual environment that is not on the path."""
    return "fineloop" if shutil.which("fineloop") else os.path.relpath(sys.argv[0])
