"""`fineloop train`."""

import argparse
from typing import Any

from pipelines.commands.arguments import Answer, add_command
from pipelines.commands.run import add_run_options, run_here


def add(commands: Any) -> None:
    """Add the command."""
    train = add_command(
        commands,
        "train",
        _train,
        does="Prepare, fine-tune and evaluate, without gate and alias.",
        more="The version is published, and `fineloop adapters promote` can put it into production.",
        example="fineloop train --set method.name=dora --set method.rank=32",
    )
    add_run_options(train)
    train.add_argument(
        "--address", default="", metavar="URL", help="Jobs API of a Ray cluster, such as http://HOST:8265"
    )


def _train(options: argparse.Namespace) -> Answer:
    return run_here(options, "train", address=options.address)
