"""How long somebody who talks to an adapter waits: until `fineloop chat` is ready, and from there to the first word.

    python -m benchmarks.first_word

An adapter of the example's base is trained for a few steps in a home of its own, or that of --home is taken. Each round
is a `fineloop chat` of its own: seconds from its start to `ready`, from the prompt, which is sent at once, to the first
word of the adapter's answer, and both together.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO

NAME = "icd10-chapters"
PROMPT = "Mpox"
FINELOOP = (sys.executable, "-m", "pipelines.cli")
SMALL = ("data.max_records=200", "train.max_steps=4", "evaluate.records=8", "ray.num_workers=1")
READY = b"ready:"
SPEAKS = b" | "  # behind the speaker's name, which is said before the answer


@dataclass(frozen=True)
class Waited:
    """Seconds."""

    ready_s: float
    first_word_s: float

    @property
    def total_s(self) -> float:
        return self.ready_s + self.first_word_s


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_word",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--home", type=Path, help=f"has an adapter {NAME}; without it, one is trained first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fineloop-bench-") as scratch:
        home = options.home or Path(scratch)
        if options.home is None:
            small = [part for each in SMALL for part in ("--set", each)]
            subprocess.run([*FINELOOP, "train", *small, "--home", str(home)], check=True, stdout=subprocess.DEVNULL)
        try:
            chat = [*FINELOOP, "chat", NAME, "--against", "none", "--home", str(home)]
            found = [waited(chat) for _ in range(options.rounds)]
        finally:
            if options.home is None:
                for what in ("ray", "store"):
                    subprocess.run([*FINELOOP, what, "down", "--home", str(home)], check=False, capture_output=True)
    for each in found:
        print(f"ready {each.ready_s:.2f} s, first word {each.first_word_s:.2f} s later, together {each.total_s:.2f} s")
    later, together = median(each.first_word_s for each in found), median(each.total_s for each in found)
    print(f"median of {len(found)}: the first word {later:.2f} s after ready, {together:.2f} s after the start")


def waited(command: Sequence[str], *, cwd: Path | None = None) -> Waited:
    """Run one `fineloop chat`, type its words, and measure how long they wait."""
    begun, pipe = time.perf_counter(), subprocess.PIPE
    with subprocess.Popen(command, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        assert chat.stderr is not None
        ready = _when(chat.stderr, READY)
        threading.Thread(target=chat.stderr.read, daemon=True).start()
        chat.stdin.write(f"{PROMPT}\n".encode())
        chat.stdin.flush()
        _when(chat.stdout, SPEAKS)
        assert chat.stdout.read(1), "the chat ended without a word"
        spoken = time.perf_counter()
        chat.stdin.close()
        chat.stdout.read()
    return Waited(ready - begun, spoken - ready)


def _when(stream: IO[bytes], text: bytes) -> float:
    """When the text has come, byte by byte."""
    heard = b""
    while text not in heard:
        byte = stream.read(1)
        if not byte:
            raise RuntimeError(f"the chat ended without saying {text!r}: {heard.decode(errors='replace')}")
        heard += byte
    return time.perf_counter()


if __name__ == "__main__":
    main()
