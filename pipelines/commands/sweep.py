"""`fineloop sweep`."""

import argparse
import sys
from typing import Any

from components.shared.errors import UserError
from pipelines.commands.arguments import Answer, add_command, load_config
from pipelines.commands.run import add_run_options
from pipelines.configs import DEFAULT_CONFIG


def add(commands: Any) -> None:
    """Add the command."""
    sweep = add_command(
        commands,
        "sweep",
        _sweep,
        does="Find the best learning rate, and whether another method is worth more than plain LoRA.",
        more="Every trial is a training like a run's, judged on the records that checkpoints are chosen on. The "
        "grid of half decades around the current rate widens while the best rate is at its edge, and is then "
        "refined around it. With --methods each method is first tuned by itself, then all are compared at their "
        "best rates on further seeds. The config's section tune says what is tried, and when a run sweeps by "
        "itself. A sweep that was cut off is resumed by its --run-id, without the trials that have ended.",
        example="fineloop sweep -c mine.toml --set tune.max_steps=64 --apply\n"
        "  fineloop sweep --methods lora,dora,rslora --set tune.max_steps=64",
    )
    add_run_options(sweep)
    sweep.add_argument("--methods", default="", metavar="A,B", help="methods to compare, as tune.methods")
    sweep.add_argument("--apply", action="store_true", help="write the best rate to the config that -c names")
    sweep.add_argument(
        "--address", default="", metavar="URL", help="Jobs API of a Ray cluster, such as http://HOST:8265"
    )


def _sweep(options: argparse.Namespace) -> Answer:
    if options.apply and options.config.resolve() == DEFAULT_CONFIG:
        raise UserError(
            f"--apply would write into the built-in example, {DEFAULT_CONFIG}: name a config of your own with -c"
        )
    from pipelines.local.run import Place
    from pipelines.local.sweep import apply, picture_path, sweep, sweep_lines

    if options.methods:
        names = [name.strip() for name in options.methods.split(",")]
        options.overrides = [*options.overrides, f"tune.methods={names}"]
    config = load_config(options)
    place = Place(options.home, sys.stderr, verbose=options.verbose, address=options.address)
    result = sweep(config, place, run_id=options.run_id)
    picture = str(picture_path(place, result.run_id))
    lines = [*sweep_lines(result), "", f"picture: {picture}"]
    body = {**result.model_dump(mode="json"), "picture": picture}
    if options.apply:
        body["applied"] = apply(options.config, config, result.best)
        lines.append(_applied_text(body["applied"], options.config))
    return Answer(body, "\n".join(lines))


def _applied_text(applied: dict[str, Any], path: Any) -> str:
    if not applied:
        return f"{path} trains at it already"
    return f"{path} now has {', '.join(f'{key} = {value}' for key, value in applied.items())}"
