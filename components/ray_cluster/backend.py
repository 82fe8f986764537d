"""What the two backends have in common: a job, its attempts, its log and how it ended."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TextIO, TypeVar

from components.shared.protocol import end_of, readable

UNREACHABLE_S = 30.0  # how long the cluster may be out of reach in the middle of a job before the step gives up on it
STOP_S = 10.0  # how long a stopped job may take to end

T = TypeVar("T")

State = Literal["live", "succeeded", "ended"]
"""The state of an attempt: live may still end well or badly; ended is failed, stopped or being deleted."""


@dataclass(frozen=True)
class Job:
    """An entry point, and the run and task that it is an attempt at."""

    run_id: str
    task: str
    command: tuple[str, ...]
    timeout_s: float
    metadata: Mapping[str, str] = field(default_factory=dict)
    kfp_run_id: str = ""  # the Kubeflow run that waits for it; empty outside Kubeflow
    patience_s: float = 0.0
    """Seconds after which no step waits for it any more, time in a queue included; 0 means timeout_s."""

    @property
    def lifetime_s(self) -> int:
        return round(self.patience_s or self.timeout_s)

    @property
    def about(self) -> dict[str, str]:
        return {
            "fineloop_run_id": self.run_id,
            "fineloop_task": self.task,
            "fineloop_lifetime_s": str(self.lifetime_s),
            **({"fineloop_kfp_run_id": self.kfp_run_id} if self.kfp_run_id else {}),
            **self.metadata,
        }


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    status: Literal["SUCCEEDED", "FAILED", "STOPPED"]
    why: str = ""  # follows "failed": the exit code or the reason
    message: str = ""  # what the cluster says about it, log lines included; empty when it says nothing


@dataclass(frozen=True)
class LiveJob:
    """A job of ours that has not ended, as `fineloop reap` looks at it."""

    job_id: str
    run_id: str
    task: str
    kfp_run_id: str
    age_s: float
    lifetime_s: float  # the `Job.lifetime_s` that its metadata says; 0 when it does not say


class Backend(Protocol):
    """One kind of access to a Ray cluster. Each method raises JobError when the cluster is out of reach or refuses."""

    noun: str  # what people call a job there

    def job_id(self, job: Job, attempt: int) -> str: ...

    def attempts(self, job: Job) -> dict[int, State]:
        """Every attempt at the job that the cluster knows of, by number."""

    def start(self, job: Job, attempt: int) -> None: ...

    def adopt(self, job_id: str) -> None:
        """Take over an attempt that an earlier process of the same step started."""

    def follow(self, job: Job, job_id: str, log: "LogCopy", poll_s: float) -> JobEnd:
        """Copy the log, to the end of its part or of the job. A job past its deadline is stopped, and a JobError."""

    def stop_now(self, job_id: str) -> None:
        """Request once, and quickly, that it stop."""

    def stop(self, job_id: str) -> None:
        """Request that it stop and wait for its end, as far as the cluster allows. Raises nothing."""

    def live(self) -> list[LiveJob]:
        """Every job of ours that has not ended, of any run."""

    def spent(self) -> list[LiveJob]:
        """Every job of ours that ended long ago and that nothing else removes, of any run."""


class LogCopy:
    """Copies a growing log to an output, whole lines at a time, as `readable` shows them; `text` is the log unchanged.
    Where several steps wait for one job, each copies a part: what comes after the line that says `after`, and up to the
    one that says `upto`, with which its part of the job is done."""

    def __init__(self, output: TextIO, *, after: str = "", upto: str = "") -> None:
        self.text = ""
        self._output = output
        self._after, self._upto = after, upto
        self._copied = 0
        self._source = ""

    @property
    def is_done(self) -> bool:
        return bool(self._upto) and end_of(self.text, self._upto) is not None

    def take(self, text: str, *, source: str = "", final: bool = False) -> None:
        """Copy what is new in `text`, the log so far. Another source of the same log continues where the last ended. A
        log that does not go on from what was copied is another one: a cluster whose head was replaced runs the job
        anew, and its log starts at the first line."""
        if source != self._source or not text.startswith(self.text[: self._copied]):
            self._copied = _same_place(self.text[: self._copied], text)
            self._source = source
        end = len(text) if final else text.rfind("\n") + 1
        if self._upto and (upto := end_of(text, self._upto)) is not None:
            end = upto
        if self._after:
            after = end_of(text, self._after)
            self._copied = max(self._copied, (0 if final else end) if after is None else after)
        if end > self._copied:
            new = text[self._copied : end]
            self._output.write(readable(new if new.endswith("\n") else new + "\n"))
            self._output.flush()
            self._copied = end
        self.text = text

    def restart(self) -> None:
        self.text, self._copied = "", 0


def rest_s(took_s: float) -> float:
    """How long a log is left alone after a reading: every source returns all of it each time, however long."""
    return min(9 * took_s, 15.0)


def _same_place(copied: str, text: str) -> int:
    """Where in `text` the lines already copied from elsewhere end: the sources differ in what they put around them."""
    last = "\n".join(copied.splitlines()[-5:])
    at = text.rfind(last) if last else -1
    return at + len(last) + 1 if at >= 0 else 0


def repeated(call: Callable[[], T], may_pass: Callable[[Exception], bool], *, for_s: float, every_s: float) -> T:
    """Call it, again and again for `for_s` while it raises what may pass; raises the last error."""
    deadline = time.monotonic() + for_s
    while True:
        try:
            return call()
        except Exception as exc:  # of whichever client; `may_pass` knows its types
            if not may_pass(exc) or time.monotonic() >= deadline:
                raise
            time.sleep(every_s)


def last_lines(text: str, count: int = 8) -> str:
    """The end of a log, indented, without blank lines."""
    return "\n  ".join([line for line in text.splitlines() if line.strip()][-count:])


_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def kubeflow_run(environment: Mapping[str, str], run_id: str) -> str:
    """The Kubeflow run of a step: KFP_RUN_ID, or the run id where that is one of Kubeflow's; else empty."""
    return environment.get("KFP_RUN_ID", "") or (run_id if _UUID.fullmatch(run_id) else "")
