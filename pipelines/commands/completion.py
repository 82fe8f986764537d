"""`fineloop completion`."""

import argparse
from typing import Any

from pipelines.commands.arguments import Answer, add_command

SHELLS = ("bash", "zsh", "tcsh", "fish")


def add_completion(commands: Any) -> None:
    completion = add_command(
        commands,
        "completion",
        _completion,
        does="Print a shell completion script for commands and options.",
        more="Where to write it: for bash ~/.local/share/bash-completion/completions/fineloop, for zsh a file "
        "_fineloop in a folder of its fpath, for fish ~/.config/fish/completions/fineloop.fish.",
        example="fineloop completion bash > ~/.local/share/bash-completion/completions/fineloop",
    )
    completion.add_argument("shell", choices=SHELLS)


def _completion(options: argparse.Namespace) -> Answer:
    from components.shared.errors import UserError

    try:
        import shtab
    except ImportError as exc:
        raise UserError("shtab is not installed here: pip install 'fineloop[local]'") from exc
    if options.shell not in shtab.SUPPORTED_SHELLS:
        raise UserError(f"this shtab knows {', '.join(shtab.SUPPORTED_SHELLS)}, and not {options.shell}: upgrade it")
    script = shtab.complete(options.root, shell=options.shell)
    return Answer({"shell": options.shell, "script": script}, script)
