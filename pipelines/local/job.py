"""Runs the Ray jobs that need no cluster as processes of this machine, under a guard.

plan and export answer with one JSON object in the last line of their standard output; chat is interactive.
"""

import codecs
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.shared.errors import FineloopError, JobError
from components.shared.protocol import STARTED, Line, parse_line
from pipelines.local import guard
from pipelines.local.server import job_environment
from pipelines.step_secrets import without_secrets

TICK_S = 0.25
DRAIN_S = 1.0
LOG_TAIL = 20  # lines of stderr to show if a process failed without reporting an error


@dataclass(frozen=True)
class Ended:
    """How the process ended, and the first failure that it reported; a later one, of the report, follows from it."""

    exit_code: int
    failure: FineloopError | None
    failed_step: str
    finished: frozenset[str]  # names of the steps that reported that they finished

    @property
    def killed_by(self) -> str:
        """Name of the signal that ended the process, or its guard; empty if none did."""
        with contextlib.suppress(ValueError):
            return signal.Signals(-self.exit_code if self.exit_code < 0 else self.exit_code - guard.SIGNALLED).name
        return ""


def watch(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    log_path: Path,
    on_line: Callable[[Line], None],
    on_tick: Callable[[], None],
    on_text: Callable[[str], None] | None = None,
) -> Ended:
    """Run a pipeline to its end. If an exception such as KeyboardInterrupt leaves this call, it is stopped. kfp.local
    prints a lot, leaves a step running when it is killed, and reports success if a branch was skipped: so it runs in a
    process of its own. `on_text` gets all that it prints, `on_line` the lines of steps that have started."""
    failures: list[tuple[str, FineloopError]] = []
    begun: set[str] = set()
    finished: set[str] = set()
    last: Line | None = None
    with log_path.open("a", encoding="utf-8", buffering=1) as log:

        def hear(text: str) -> None:
            nonlocal last
            log.write(text + "\n")
            if on_text is not None:
                on_text(text)
            line = parse_line(text)
            if line is None:
                return
            if line.text == STARTED:
                begun.add(line.step)
            if line.step not in begun or line == last:  # Ray Train copies a worker's lines
                return
            last = line
            if line.seconds is not None:
                finished.add(line.step)
            if line.failure is not None:
                failures.append((line.step, line.failure))
            on_line(line)

        exit_code = run_heard(command, environment=environment, directory=directory, on_text=hear, on_tick=on_tick)
    failed_step, failure = failures[0] if failures else ("", None)
    return Ended(exit_code, failure, failed_step, frozenset(finished))


def run_heard(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    on_text: Callable[[str], None],
    on_tick: Callable[[], None] = lambda: None,
    stderr: int | None = subprocess.STDOUT,
) -> int:
    """Run the command under a guard to its end and return its exit code; `on_text` gets each line of its output. If an
    exception leaves this call, the command is stopped."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb", buffering=0) as output:
        process = guard.start(
            list(command), environment=dict(environment), directory=directory, stdout=write_end, stderr=stderr
        )
        os.close(write_end)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pending = ""
        try:
            while True:
                ended = process.poll() is not None
                readable, _, _ = select.select([output], [], [], DRAIN_S if ended else TICK_S)
                chunk = output.read(1 << 16) if readable else b""
                if not chunk and (readable or ended):
                    break
                *lines, pending = (pending + decoder.decode(chunk)).split("\n")
                for text in lines:
                    on_text(text)
                on_tick()
            if pending:
                on_text(pending)
        finally:
            guard.stop(process)
    return process.returncode


@dataclass(frozen=True)
class Job:
    """A module to run without this process's secrets, as it may run a base's code; `config` is a file or s3://."""

    module: str
    config: str
    arguments: Sequence[str] = ()
    overrides: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        overrides = [part for override in self.overrides for part in ("--set", override)]
        return [sys.executable, "-m", self.module, "--config", self.config, *overrides, *self.arguments]

    @property
    def whole_environment(self) -> dict[str, str]:
        return {**without_secrets(os.environ), **self.environment, **job_environment(os.environ)}


def answer(job: Job, *, on_line: Callable[[str], None] = lambda _: None, verbose: bool = False) -> dict[str, Any]:
    """Run the job and return its answer. `on_line` gets its lines of progress; its stderr is shown if `verbose`. Raises
    FineloopError: the job failed; the exception has the class of the job's own error."""
    failures: list[FineloopError] = []
    last = ""

    def hear(text: str) -> None:
        nonlocal last
        last = text
        line = parse_line(text)
        if line is not None and line.failure is not None:
            failures.append(line.failure)
        elif line is not None:
            on_line(line.text)

    with tempfile.TemporaryFile() as log:
        exit_code = run_heard(
            job.command,
            environment=job.whole_environment,
            directory=Path.cwd(),
            on_text=hear,
            stderr=None if verbose else log.fileno(),
        )
        log.seek(0)
        tail = "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_TAIL:])
    if exit_code:
        why = f"{job.module} ended with {exit_code} and gave no reason:\n{tail}".rstrip()
        raise failures[-1] if failures else JobError(why)
    body: dict[str, Any] = json.loads(last)
    return body


def talk(job: Job, *, stdout: int | None = None) -> int:
    """Run the job on this process's own standard streams until it ends, and return its exit code. An interrupt is
    passed on to the job, which decides what to end. `stdout` is a descriptor that replaces our own."""
    process = guard.start(
        job.command,
        environment=job.whole_environment,
        directory=Path.cwd(),
        stdin=sys.stdin.fileno(),
        stdout=sys.stdout.fileno() if stdout is None else stdout,
        stderr=sys.stderr.fileno(),
    )
    before = signal.signal(signal.SIGINT, lambda *_: guard.interrupt(process))
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        guard.stop(process)
