"""The lines that a step or a Ray job prints, for people and for the process that started it.

`[<step>] text` is for people. A failure is one such line, from which another process raises the same error:
`[<step>] failed {"error": "<class>", "message": "...", "exit_code": N}`.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass

from components.shared.errors import FineloopError, by_name

# Ray puts "(RayTrainWorker pid=12083, ip=10.0.0.7) " before what a worker prints.
_LINE = re.compile(r"^\s*(?:\(\w+ pid=\d+[^()]*\) )?\[([a-z][a-z0-9_-]*)\] (.*\S)\s*$")
_WORKER = re.compile(r"^\(\w+ pid=\d+[^()]*\) (?=\[[a-z][a-z0-9_-]*\] )")
_SILENT = re.compile(r"^\(\w+ pid=\d+[^()]*\)\s*$")
"""An empty line of a worker: Ray breaks the line before each state of a bar, and puts the worker's name on it."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys: all control characters but tabs and line ends, and those that turn the direction of text."""
_BAR = re.compile(r"\d+%\|.*\| *[\d.]+[kMGT]?/")
"""A progress bar of tqdm: "12%|####    | 3/25 [00:01<00:09, 2.1it/s]"."""
STARTED = "started"
"""The text of a step's first line."""
TRAINED = "trained: comparing it"
"""The text that a job that trains and then compares prints in between."""
_FINISHED = re.compile(r"^finished in ([0-9.]+) s$")


@dataclass(frozen=True)
class Line:
    """One `[<step>] text` line."""

    step: str
    text: str

    @property
    def failure(self) -> FineloopError | None:
        """The error that this line reports, of the same class if this process knows it; None if it reports none."""
        word, _, body = self.text.partition(" ")
        if word != "failed" or not body.startswith("{"):
            return None
        try:
            failure = json.loads(body)
            return by_name(str(failure["error"]), str(failure["message"]))
        except (ValueError, KeyError, TypeError):
            return None

    @property
    def seconds(self) -> float | None:
        """How long the step took, in seconds; None unless this line says that it finished."""
        match = _FINISHED.match(self.text)
        return float(match[1]) if match else None


def say(step: str, text: str) -> None:
    """Print one line of the protocol."""
    print(f"[{step}] {' '.join(text.split())}", flush=True)  # noqa: T201 - stdout is the protocol


def say_failure(step: str, error: BaseException) -> None:
    """Print the line that carries an error to another process."""
    exit_code = error.exit_code if isinstance(error, FineloopError) else 1
    body = {"error": type(error).__name__, "message": str(error), "exit_code": exit_code}
    print(f"[{step}] failed {json.dumps(body)}", flush=True)  # noqa: T201 - stdout is the protocol


def parse_line(line: str) -> Line | None:
    """Read a line of the protocol, however a runner has indented, coloured or prefixed it; None for any other line."""
    match = _LINE.match(_COLOUR.sub("", line))
    return Line(match[1], printable(match[2])) if match else None


def printable(text: str) -> str:
    """Escape control characters: names and logs come from a store into which others may write."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def readable(log: str) -> str:
    """Whole lines of a job's log for people: no colours, no progress bars, and no worker's name before our own lines;
    other control characters are escaped.

    Our own lines come from rank 0 alone; lines that a library prints keep their worker's name.
    """
    lines = [_COLOUR.sub("", line) for line in log.split("\n")]
    kept = [line.rpartition("\r")[2] for line in lines if not (_BAR.search(line) or _SILENT.match(line))]
    shown = [_WORKER.sub("", line) for line in kept]
    return printable("\n".join(shown))


def end_of(log: str, text: str) -> int | None:
    """Where the first line with this text ends, whichever step printed it; None if there is none."""
    at = log.find(text)
    while at >= 0:
        end = log.find("\n", at) + 1 or len(log)
        line = parse_line(log[log.rfind("\n", 0, at) + 1 : end])
        if line is not None and line.text == text:
            return end
        at = log.find(text, end)
    return None


def find_failure(log: str) -> FineloopError | None:
    """The last failure in a log; None if there is none."""
    for text in reversed(log.splitlines()):
        line = parse_line(text)
        if line is not None and line.failure is not None:
            return line.failure
    return None


def duration(seconds: float) -> str:
    """A measured duration: below a minute to a tenth of a second, below an hour to the second, else to the minute."""
    if 0 < seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{f'{seconds:.1f}'.removesuffix('.0')} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def estimated_duration(seconds: float) -> str:
    """An estimated duration, no finer than it is known: in whole seconds below 90, else in whole minutes."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, noun: str) -> str:
    """The number with its noun, as in `1 record` and `1,200 records`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def script_source(script: str) -> str:
    """The source of a Content-Security-Policy that allows exactly this inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
