"""The Ray jobs that need no cluster, as a process of this machine that answers with one JSON object: plan, estimate."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared.errors import FineloopError, JobError
from components.shared.protocol import find_failure
from pipelines.local.service import python_path

LOG_TAIL = 20  # lines told of a process that ended without a word


@dataclass(frozen=True)
class Asked:
    """A job under way."""

    module: str
    process: "subprocess.Popen[str]"


@contextlib.contextmanager
def asking(
    module: str,
    config: Path,
    *arguments: str,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    verbose: bool = False,
) -> Iterator[Asked]:
    """Start `python -m MODULE --config CONFIG`, and end it with this context if nobody waited for its answer."""
    command = [sys.executable, "-m", module, "--config", str(config.absolute()), *arguments]
    command += [part for override in overrides for part in ("--set", override)]
    with subprocess.Popen(
        command,
        env={**os.environ, **(environment or {}), "PYTHONPATH": python_path(os.environ)},
        stdout=subprocess.PIPE,
        stderr=None if verbose else subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Asked(module, process)
        finally:
            process.kill()


def answer(asked: Asked) -> dict[str, Any]:
    """Wait for the answer.

    Raises:
        FineloopError: what the job failed with, of its own class.
    """
    stdout, stderr = asked.process.communicate()
    if asked.process.returncode:
        raise _failure(asked, stdout, stderr or "")
    body: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return body


def _failure(asked: Asked, stdout: str, stderr: str) -> FineloopError:
    failure = find_failure(stdout)
    if failure is not None:
        return failure.as_error()
    tail = "\n".join(stderr.splitlines()[-LOG_TAIL:])
    return JobError(f"{asked.module} ended with {asked.process.returncode} and gave no reason:\n{tail}".rstrip())
