"""`fineloop`: the command line. Nothing heavy is imported before a command needs it, so that help answers at once."""

import argparse
import errno
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from types import FrameType
from typing import Any

from components.shared import garbage
from components.shared.errors import FineloopError
from components.shared.protocol import printable
from pipelines.commands import adapters, chat, completion, data, doctor, init, run, runs, schedule, servers
from pipelines.commands.arguments import EXIT_CODES, Answer, Parser, print_err

INTERRUPTED = 130
GROUPS = {
    "make an adapter": ("init", "data", "plan", "run", "train", "sweep"),
    "use and keep adapters": ("chat", "serve", "adapters", "push", "reproduce"),
    "look at runs": ("runs", "compare"),
    "on Kubeflow": ("submit", "schedule"),
    "this machine": ("doctor", "store", "ray", "completion"),
}
"""The commands of the help; those that machines call, and old names, are left out, and in docs/cli.md."""


class _Grouped(argparse.RawDescriptionHelpFormatter):
    """Lists the commands by their groups."""

    def _format_action(self, action: argparse.Action) -> str:
        if not isinstance(action, argparse._SubParsersAction):
            return super()._format_action(action)
        lines = {
            each.dest: super(_Grouped, self)._format_action(each) for each in self._iter_indented_subactions(action)
        }
        return "\n".join(f"  {title}\n{''.join(lines[name] for name in names)}" for title, names in GROUPS.items())


def parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    root = Parser(
        prog="fineloop",
        description="Keeps a language model's domain adapters fresh: data in, a promoted and traceable adapter out.",
        epilog=f"start here:\n  fineloop run              the built-in example, end to end, on this machine\n"
        f"  fineloop run FILE         the same with your own data\n"
        f"  fineloop COMMAND --help   what a command does, with an example\n\n{EXIT_CODES}",
        formatter_class=_Grouped,
        allow_abbrev=False,
    )
    root.add_argument("--version", action="store_true", help="say which release this is")
    root.set_defaults(command=_alone, root=root, parser=root, verbose=False, json=False)
    commands = root.add_subparsers(title="commands", metavar="COMMAND")
    for add in (
        *(init.add_init, data.add_data, data.add_schema),
        *(run.add_plan, run.add_run, run.add_train, run.add_sweep, run.add_submit, run.add_compile),
        *(chat.add_chat, chat.add_serve, adapters.add_adapters, adapters.add_push),
        *(runs.add_runs, runs.add_compare, runs.add_reproduce, runs.add_replay, runs.add_watch),
        *(schedule.add_schedules, doctor.add_doctor, servers.add_store, servers.add_ray, servers.add_reap),
        completion.add_completion,
    ):
        add(commands)
    return root


def _alone(options: argparse.Namespace) -> Answer:
    """Answer a command line without a command: the release with --version, the help otherwise."""
    return Answer(text=f"fineloop {version('fineloop')}" if options.version else options.parser.format_help().rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    options, unknown = parser().parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    garbage.leave_at_exit()
    signal.signal(signal.SIGTERM, _interrupt)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    logging.getLogger("urllib3.connectionpool").setLevel(logging.DEBUG if options.verbose else logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_escape)
    try:
        answer: Answer = options.command(options)
    except KeyboardInterrupt as exc:
        print_err("\n".join(["interrupted: nothing of this command is left running", *_notes(exc)]))
        return _fail(options, {"error": {"kind": "Interrupted", "message": "interrupted"}}, INTERRUPTED)
    except FineloopError as exc:
        print_err("\n".join([f"fineloop: {exc}", *_notes(exc)]))
        return _fail(options, exc.as_json(), exc.exit_code)
    except Exception as exc:  # the entry point: a bug of ours, shown with its traceback
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):  # not a bug: no disk space
            print_err("\n".join([f"fineloop: {exc}: free some space", *_notes(exc)]))
        else:
            traceback.print_exc()
        return _fail(options, {"error": {"kind": type(exc).__name__, "message": str(exc)}}, 1)
    return _finish(options, answer)


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), None
    return True


def _finish(options: argparse.Namespace, answer: Answer) -> int:
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


def _notes(exc: BaseException) -> list[str]:
    return [f"  {note}" for note in getattr(exc, "__notes__", [])]


def _fail(options: argparse.Namespace, body: dict[str, Any], exit_code: int) -> int:
    if options.json:
        print(json.dumps({**body, "exit_code": exit_code}), flush=True)  # noqa: T201
    return exit_code


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
