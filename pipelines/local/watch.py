"""Run the pipeline in a process of its own and hear what it says.

kfp.local prints much, leaves a step running when it is killed, and reports success where a branch was skipped in
silence. So it runs under a guard that leaves nothing behind; all it prints goes to a log, and only lines of the step
protocol go on.
"""

import codecs
import os
import select
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.shared.protocol import Failure, Line, parse_line
from pipelines.local import guard

STEPS = ("prepare", "finetune", "evaluate", "gate", "promote", "hold", "skip", "report")
TICK_S = 0.25
DRAIN_S = 1.0


@dataclass(frozen=True)
class Ended:
    """How the process ended, and the first failure that it told of: the report's own, after it, follows from it."""

    exit_code: int
    failure: Failure | None
    failed_step: str


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
    """Run the command to its end. When this call is left early, by Ctrl-C say, the command is stopped first.

    `on_text` gets everything that the process prints, `on_line` the lines meant for people.
    """
    read_end, write_end = os.pipe()
    with log_path.open("a", encoding="utf-8") as log, os.fdopen(read_end, "rb", buffering=0) as output:
        process = guard.start(
            list(command),
            orphan_signal=signal.SIGTERM,
            environment=dict(environment),
            log=write_end,
            directory=directory,
        )
        os.close(write_end)
        found: list[tuple[str, Failure]] = []
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pending, last = "", None
        try:
            while True:
                ended = process.poll() is not None
                readable, _, _ = select.select([output], [], [], DRAIN_S if ended else TICK_S)
                chunk = output.read(1 << 16) if readable else b""
                if not chunk and (readable or ended):
                    break
                *lines, pending = (pending + decoder.decode(chunk)).split("\n")
                for text in lines:
                    log.write(text + "\n")
                    if on_text is not None:
                        on_text(text)
                    line = parse_line(text)
                    if line is None or line.step not in STEPS or line == last:  # Ray Train copies a worker's lines
                        continue
                    last = line
                    if line.failure is not None:
                        found.append((line.step, line.failure))
                    on_line(line)
                log.flush()
                on_tick()
            log.write(pending)
        finally:
            guard.stop(process)
    failed_step, failure = found[0] if found else ("", None)
    return Ended(process.returncode, failure, failed_step)
