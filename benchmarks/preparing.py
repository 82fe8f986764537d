"""Speed and memory of the prepare step at so many rows, beside Polars, which does the plain part of its work.

Each is a process of its own on the same made-up JSON lines. Fineloop does all that its prepare step does up to the
upload. Polars reads, puts into NFC, strips, drops the earlier rows of an id and of a content, divides by a hash and
writes two Parquet files: it gives no reasons, looks for no personal data and compares no prompts. The third side is
json.loads of each line alone, for ratios that hold on any machine.
"""

import argparse
import importlib.util
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import example

WORDS, SHORT, LONG = 20_000, 12, 1500
"""Different words, and those of a prompt; the latter are some 2,000 tokens."""
EVAL_SHARE = 0.1


def main() -> None:
    parser = example.parser("preparing", __doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000], metavar="N")
    parser.add_argument("--long", action="store_true", help=f"prompts of {LONG} words in place of {SHORT}")
    parser.add_argument("--near", type=float, default=0.8, help="data.near_duplicates; 0 compares no prompts")
    parser.add_argument("--one", choices=SIDES, help="measure one here, as JSON")
    parser.add_argument("--file", help="with --one: the rows")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_measured(options)))
        return
    print(f"{'rows':>10}  {'':>8}  {'CPU s':>8} {'wall s':>8} {'rows/CPU s':>10} {'peak MiB':>9}  CPU s of each step")
    for count in options.rows:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "rows.jsonl")
            _make(path, count, LONG if options.long else SHORT)
            for side in SIDES:
                if side == "polars" and importlib.util.find_spec(side) is None:
                    print(f"{count:10,}  {side:>8}  not installed", flush=True)
                    continue
                chosen = ["--one", side, "--file", str(path), "--near", str(options.near)]
                _print(side, count, example.in_process("preparing", chosen))


def _print(side: str, count: int, measured: dict[str, Any]) -> None:
    steps = "  ".join(f"{name} {seconds:.1f}" for name, seconds in measured["steps"].items())
    rate = count / measured["cpu_s"]
    figures = f"{measured['cpu_s']:8.1f} {measured['wall_s']:8.1f} {rate:10,.0f} {measured['peak_mb']:9,.0f}"
    print(f"{count:10,}  {side:>8}  {figures}  {steps}", flush=True)


def _make(path: Path, count: int, words: int) -> None:
    rng = random.Random(0)
    known = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 9))) for _ in range(WORDS)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {"prompt": " ".join(rng.choices(known, k=words)) + "?", "completion": f"account {number % 97}"}
            file.write(json.dumps({"id": str(number), **row}) + "\n")


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    started, steps = time.perf_counter(), {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        before = _cpu_s()
        yield
        steps[name] = _cpu_s() - before

    with tempfile.TemporaryDirectory() as scratch:
        SIDES[options.one](options.file, Path(scratch), step, options)
    return {"cpu_s": _cpu_s(), "wall_s": time.perf_counter() - started, "peak_mb": example.peak_mb(), "steps": steps}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _fineloop(source: str, scratch: Path, step: Any, options: argparse.Namespace) -> None:
    from components.config.train import DataConfig
    from components.prepare import workspace
    from components.prepare.prepare import build_profile, read_sources
    from components.prepare.sources import find_sources
    from components.prepare.split import deduplicate, split

    with workspace.opened(memory_bytes=2 * 2**30) as work:
        with step("read"):
            read = read_sources(find_sources(source), work.accept, work.reject)
            work.finish()
        with step("deduplicate"):
            read.repeated = deduplicate(work)
        with step("split"):
            data = DataConfig(source=[], eval_share=EVAL_SHARE, near_duplicates=options.near, max_reject_share=1.0)
            found = split(work, data)
        with step("profile"):
            build_profile(work, read, found)


def _polars(source: str, scratch: Path, step: Any, options: argparse.Namespace) -> None:
    import polars as pl

    texts = [pl.col(name).str.normalize("NFC").str.strip_chars_end() for name in ("prompt", "completion")]
    rows = (
        pl.scan_ndjson(source)
        .with_columns(*texts)
        .unique("id", keep="last", maintain_order=True)
        .unique(["prompt", "completion"], keep="first", maintain_order=True)
        .with_columns(place=pl.col("id").hash(0))
        .sort("place")
    )
    border = int(EVAL_SHARE * 2**64)
    for name, side in (("eval", pl.col("place") < border), ("train", pl.col("place") >= border)):
        rows.filter(side).drop("place").sink_parquet(scratch / f"{name}.parquet", compression="zstd")


def _json(source: str, scratch: Path, step: Any, options: argparse.Namespace) -> None:
    with Path(source).open(encoding="utf-8") as file:
        for line in file:
            json.loads(line)


SIDES = {"fineloop": _fineloop, "polars": _polars, "json": _json}


if __name__ == "__main__":
    main()
