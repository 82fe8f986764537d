"""`fineloop`: the command line."""

import argparse
import errno
import importlib
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from components.shared import garbage
from components.shared.errors import FineloopError
from components.shared.protocol import printable
from pipelines.commands.arguments import COMMANDS, EXIT_CODES, Answer, Command, Parser, print_err

INTERRUPTED = 130
DECLARED = re.compile(r'^(?:@command|_declare)\(\s*"([a-z]+)"(?=.*?"""(.*?)(?:"""|\n))', re.DOTALL | re.MULTILINE)
"""In the source of a module, a command or group that it declares, and the first line of the command's help."""
LISTED = {
    "make an adapter": ("init", "data", "plan", "run", "train", "sweep"),
    "use and keep adapters": ("chat", "adapters", "push"),
    "look at runs": ("runs", "compare"),
    "on Kubeflow": ("submit", "schedule"),
    "this machine": ("doctor", "store"),
}
"""The commands of the help; the others are named below them, and docs/cli.md has all."""
UNLISTED = {
    *("adapters announce", "adapters approve", "adapters audit", "adapters history", "adapters lineage"),
    *("adapters page", "adapters serve-manifest", "schedule show", "store env"),
}
"""Those of the groups that are named below the others."""
GROUPS = {
    "adapters": "list, show, promote, roll back, verify, fetch and export adapters",
    "runs": "list, show and follow runs; stop those on Kubeflow",
    "schedule": "retrain by the clock on Kubeflow: create, list, update, pause, resume, delete",
    "store": "this machine's own S3 server: up, down",
    "ray": "this machine's own Ray head: up, down",
}


class _Grouped(argparse.RawDescriptionHelpFormatter):
    """Lists the commands by their groups."""

    def _format_action(self, action: argparse.Action) -> str:
        if not isinstance(action, argparse._SubParsersAction):
            return super()._format_action(action)
        lines = {
            verb.dest: super(_Grouped, self)._format_action(verb) for verb in self._iter_indented_subactions(action)
        }
        return "\n".join(f"  {title}\n{''.join(lines[name] for name in names)}" for title, names in LISTED.items())


def parser(arguments: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Build the parser of the whole command line, or what `arguments` need of it.

    The latter has of the other commands only the names and the help, read from the source: to import the modules of all
    takes half a second.
    """
    helps = dict[str, str]()
    for path in sorted(Path(__file__).with_name("commands").glob("[a-z]*.py")):
        declared = dict(DECLARED.findall(path.read_text(encoding="utf-8")))
        helps |= declared
        if arguments is None or {path.stem, *declared}.intersection(arguments):
            importlib.import_module(f"pipelines.commands.{path.stem}")  # which declares its commands
    listed = [name for names in LISTED.values() for name in names]
    names = sorted(helps | GROUPS, key=lambda name: (*listed, name).index(name))
    root = Parser(
        prog="fineloop",
        description="Keeps a language model's domain adapters fresh: data in, a promoted and traceable adapter out.",
        epilog=f"start here:\n  fineloop run              the built-in example, end to end, on this machine\n"
        f"  fineloop run FILE         the same with your own data\n"
        f"  fineloop COMMAND --help   what a command does, with an example\n\n"
        f"also: {', '.join(name for name in names if name not in listed)} (docs/cli.md)\n\n{EXIT_CODES}",
        formatter_class=_Grouped,
    )
    root.add_argument("--version", action="store_true", help="say which release this is")
    root.set_defaults(command=_alone, whole=parser, parser=root, verbose=False, json=False)
    commands = root.add_subparsers(title="commands", metavar="COMMAND")
    for name in names:
        verbs = {full: full.split()[1] for full in COMMANDS if full.startswith(f"{name} ")}
        if name in COMMANDS:  # which may have verbs beside its own arguments
            group: Any = COMMANDS[name].add_to(commands, name)
        elif name not in GROUPS:
            Command(_alone, (), "", helps[name]).add_to(commands, name)
        else:
            also = ", ".join(verb for full, verb in verbs.items() if full in UNLISTED)
            text, epilog = GROUPS[name], f"also: {also} (docs/cli.md)\n\n{EXIT_CODES}" if also else EXIT_CODES
            group = commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.", epilog=epilog)
            group = group.add_subparsers(metavar="COMMAND", required=True)
        for full, verb in verbs.items():
            COMMANDS[full].add_to(group, verb, is_listed=full not in UNLISTED)
    return root


def _alone(options: argparse.Namespace) -> Answer:
    """Answer a command line without a command: the release with --version, the help otherwise."""
    return Answer(text=f"fineloop {version('fineloop')}" if options.version else options.parser.format_help().rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    options, unknown = parser(arguments or sys.argv[1:]).parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    garbage.leave_at_exit()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    logging.getLogger("urllib3.connectionpool").setLevel(logging.DEBUG if options.verbose else logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_escape)
    try:
        answer: Answer = options.command(options)
    except KeyboardInterrupt as exc:
        text = "interrupted: nothing of this command is left running"
        return _fail(options, exc, text, {"error": {"kind": "Interrupted", "message": "interrupted"}}, INTERRUPTED)
    except FineloopError as exc:
        return _fail(options, exc, f"fineloop: {exc}", exc.as_json(), exc.exit_code)
    except Exception as exc:  # the entry point: a bug of ours, shown with its traceback
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):  # not a bug: no disk space
            text = f"fineloop: {exc}: free some space"
        else:
            traceback.print_exc()
            text = "this is a bug of Fineloop's"
        return _fail(options, exc, text, {"error": {"kind": type(exc).__name__, "message": str(exc)}}, 1)
    try:
        if answer.text:
            aside = options.json or answer.is_aside
            print(printable(answer.text), file=sys.stderr if aside else sys.stdout)
        if options.json:
            print(json.dumps(answer.body), flush=True)  # noqa: T201
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return answer.exit_code


def _fail(options: argparse.Namespace, exc: BaseException, text: str, body: dict[str, Any], exit_code: int) -> int:
    print_err("\n".join([text, *(f"  {note}" for note in getattr(exc, "__notes__", []))]))
    if options.json:
        print(json.dumps({**body, "exit_code": exit_code}), flush=True)  # noqa: T201
    return exit_code


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), None
    return True


if __name__ == "__main__":
    sys.exit(main())
