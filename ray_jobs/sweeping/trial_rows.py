"""A trial as text: a row of a table, which the command line aligns, and the reason why it failed."""

import re

from components.records.sweep import Trial
from components.shared.durations import duration
from components.shared.errors import FineloopError

COLUMNS = ("method", "rank", "batch", "rate", "seed", "loss", "steps", "outcome")
_ERROR = re.compile(r"^(?P<module>([a-z_]\w*\.)*)(?P<whole>[A-Z]\w+: (?P<text>.+))$")


def header() -> str:
    """The header of the table."""
    return " ".join(["|", *COLUMNS])


def row(trial: Trial) -> str:
    """The row of a trial that has ended; only its last column may contain spaces."""
    loss = f"{trial.loss:.4f}" if trial.loss is not None else "-"
    took = f" in {duration(trial.seconds)}" if trial.seconds is not None else ""
    why = f": {trial.why}" if trial.why else ""
    text = trial.general_text
    if text and (after := text.loss("candidate")) is not None:
        before = text.loss("base")
        why += f", general text {after:.4f}" + (f" (its base {before:.4f})" if before is not None else "")
    return (
        f"| {trial.method} {trial.rank} {trial.batch_size} {trial.learning_rate:.3g} {trial.seed} {loss} "
        f"{trial.steps}/{trial.num_steps} {trial.status}{took}{why}"
    )


def cause(message: str) -> str:
    """The cause of a failure in one line, from Ray's report: a traceback, or a message that a process died."""
    _, *lines = [line for line in message.splitlines() if line.strip()] or [""]
    errors = [found for line in lines if (found := _ERROR.match(line))]
    if errors:
        return errors[-1]["text"] if errors[-1]["module"] == f"{FineloopError.__module__}." else errors[-1]["whole"]
    return lines[0] if lines else "it said nothing"
