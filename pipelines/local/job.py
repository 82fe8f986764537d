"""Runs the Ray jobs that need no cluster as processes of this machine, under a guard.

plan and export answer with one JSON object in the last line of their standard output; chat is interactive.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.shared.errors import FineloopError, JobError
from components.shared.protocol import Failure, parse_line
from pipelines.local import guard
from pipelines.local.service import job_environment
from pipelines.local.step_secrets import without_secrets
from pipelines.local.watch import run_heard

LOG_TAIL = 20  # lines of stderr to show if a process failed without reporting an error


@dataclass(frozen=True)
class Job:
    """A module to run. `config` is a file or the s3:// address of one. `environment` is added to this process's own
    environment without the secrets, because the job may run a base's code."""

    module: str
    config: str
    arguments: Sequence[str] = ()
    overrides: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self) -> list[str]:
        """Return the command line."""
        overrides = [part for override in self.overrides for part in ("--set", override)]
        return [sys.executable, "-m", self.module, "--config", self.config, *overrides, *self.arguments]

    def whole_environment(self) -> dict[str, str]:
        """Return all environment variables of the process."""
        return {**without_secrets(os.environ), **self.environment, **job_environment(os.environ)}


def answer(
    job: Job,
    *,
    on_line: Callable[[str], None] = lambda text: None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Run the job and return its answer. `on_line` gets its lines of progress; its stderr is shown if `verbose`.

    Raises:
        FineloopError: the job failed; the exception has the class of the job's own error.
    """
    failures: list[Failure] = []
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
            job.command(),
            environment=job.whole_environment(),
            directory=Path.cwd(),
            on_text=hear,
            stderr=None if verbose else log.fileno(),
        )
        log.seek(0)
        tail = "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_TAIL:])
    if exit_code:
        raise failures[-1].as_error() if failures else _without_a_reason(job, exit_code, tail)
    body: dict[str, Any] = json.loads(last)
    return body


def talk(job: Job, *, stdout: int | None = None) -> int:
    """Run the job on this process's own standard streams until it ends, and return its exit code.

    An interrupt is passed on to the job, which decides what to end. `stdout` is a descriptor that replaces our own.
    """
    process = guard.start(
        job.command(),
        orphan_signal=signal.SIGTERM,
        environment=job.whole_environment(),
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


def _without_a_reason(job: Job, exit_code: int, tail: str) -> FineloopError:
    return JobError(f"{job.module} ended with {exit_code} and gave no reason:\n{tail}".rstrip())
