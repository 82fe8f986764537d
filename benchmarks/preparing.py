"""Speed and memory of the prepare step at so many rows, beside libraries that do the plain part of its work.

Each is a process of its own on the same made-up JSON lines. Fineloop does all that its prepare step does up to the
upload. datasets, DuckDB and Polars read, put into NFC, strip, drop the earlier rows of an id and of a content, divide
by a hash and write two Parquet files: they give no reasons, look for no personal data and compare no prompts. Each
counts where it is installed.
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peak import peak_mb
from components.shared.machine import in_environment

WORDS, SHORT, LONG = 20_000, 12, 1500
"""Different words, and those of a prompt; the latter are some 2,000 tokens."""
EVAL_SHARE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preparing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000], metavar="N")
    parser.add_argument("--long", action="store_true", help=f"prompts of {LONG} words in place of {SHORT}")
    parser.add_argument("--near", type=float, default=0.8, help="data.near_duplicates; 0 compares no prompts")
    parser.add_argument("--memory-gib", type=float, default=2, help="data.memory_gib")
    parser.add_argument("--files", type=int, default=0, help="have the rows in so many files of a SeaweedFS here")
    parser.add_argument("--only", nargs="+", choices=SIDES, help="these alone")
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
            with _where(path, Path(scratch), options.files) as source:
                for side in options.only or (["fineloop"] if options.files else SIDES):
                    _print(side, count, _in_process(side, source, options))


@contextmanager
def _where(path: Path, scratch: Path, num_files: int) -> Iterator[str]:
    """The file itself, or the s3:// folder that its lines are shared out in."""
    if not num_files:
        yield str(path)
        return
    from components.store.store import open_uri
    from pipelines.local.local_services import local_services

    with local_services(scratch / "home", bucket="benchmark", ray=False) as environment, in_environment(environment):
        store, _ = open_uri("s3://benchmark/rows/", field="--files")
        lines = path.read_bytes().splitlines(keepends=True)
        for number in range(num_files):
            store.put(f"rows/{number:06}.jsonl", b"".join(lines[number::num_files]))
        yield "s3://benchmark/rows/"


def _print(side: str, count: int, found: dict[str, Any] | str) -> None:
    if isinstance(found, str):
        print(f"{count:10,}  {side:>8}  {found}", flush=True)
        return
    steps = "  ".join(f"{name} {seconds:.1f}" for name, seconds in found["steps"].items())
    rate = count / found["cpu_s"]
    figures = f"{found['cpu_s']:8.1f} {found['wall_s']:8.1f} {rate:10,.0f} {found['peak_mb']:9,.0f}"
    print(f"{count:10,}  {side:>8}  {figures}  {steps}", flush=True)


def _in_process(side: str, source: str, options: argparse.Namespace) -> dict[str, Any] | str:
    """Its figures, or why there are none."""
    if side != "fineloop" and importlib.util.find_spec(side) is None:
        return "not installed"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.preparing", "--one", side, "--file", source]
    command += ["--near", str(options.near), "--memory-gib", str(options.memory_gib)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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
    return {"cpu_s": _cpu_s(), "wall_s": time.perf_counter() - started, "peak_mb": peak_mb(), "steps": steps}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _fineloop(source: str, scratch: Path, step: Any, options: argparse.Namespace) -> None:
    from components.prepare import workspace
    from components.prepare.prepare import build_profile, read_sources
    from components.prepare.sources import find_sources
    from components.prepare.split import deduplicate, split

    with workspace.opened(memory_bytes=round(options.memory_gib * 2**30)) as work:
        with step("read"):
            read = read_sources(find_sources(source), work.accept, work.reject)
            work.finish()
        with step("deduplicate"):
            unique = deduplicate(work)
        with step("split"):
            found = split(work, eval_share=EVAL_SHARE, max_records=0, near_duplicates=options.near, max_near_share=1.0)
        with step("profile"):
            build_profile(work, read, unique, found)


def _duckdb(source: str, scratch: Path, step: Any, options: argparse.Namespace) -> None:
    import duckdb

    limit = {"memory_limit": f"{int(options.memory_gib * 2**29)}B", "temp_directory": str(scratch / "spilled")}
    connection = duckdb.connect(config={**limit, "preserve_insertion_order": False})
    connection.execute(
        "CREATE TABLE kept AS SELECT id, arg_max(prompt, n) AS prompt, arg_max(completion, n) AS completion"
        f" FROM (SELECT row_number() OVER () AS n, id, nfc_normalize(rtrim(prompt)) AS prompt,"
        f" nfc_normalize(rtrim(completion)) AS completion FROM read_json('{source}', format = 'newline_delimited'))"
        " GROUP BY id"
    )
    connection.execute(
        "CREATE TABLE placed AS SELECT *, sha256('id:' || id) AS place FROM kept"
        " QUALIFY row_number() OVER (PARTITION BY sha256(prompt || completion) ORDER BY place) = 1"
    )
    border = f"{int(EVAL_SHARE * 2**32):08x}"
    for name, side in (("eval", f"place < '{border}'"), ("train", f"place >= '{border}'")):
        query = f"SELECT id, prompt, completion FROM placed WHERE {side} ORDER BY place"
        connection.execute(f"COPY ({query}) TO '{scratch / name}.parquet' (COMPRESSION zstd)")


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


def _datasets(source: str, scratch: Path, step: Any, options: argparse.Namespace) -> None:
    import hashlib
    import unicodedata

    os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets

    datasets.disable_progress_bars()
    seen: set[bytes] = set()

    def normalised(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        texts = {name: [unicodedata.normalize("NFC", text).rstrip() for text in batch[name]] for name in TEXTS}
        places = [hashlib.sha256(f"id:{each}".encode()).hexdigest() for each in batch["id"]]
        return {**texts, "place": places}

    def is_new(row: dict[str, str]) -> bool:
        content = hashlib.sha256(f"{row['prompt']}{row['completion']}".encode()).digest()
        return not (content in seen or seen.add(content))  # type: ignore[func-returns-value]

    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=str(scratch / "cache"))
    rows = rows.map(normalised, batched=True).filter(is_new).sort("place")
    border = f"{int(EVAL_SHARE * 2**32):08x}"
    for name, side in (("eval", lambda place: place < border), ("train", lambda place: place >= border)):
        rows.filter(side, input_columns="place").to_parquet(scratch / f"{name}.parquet")


TEXTS = ("prompt", "completion")
SIDES: dict[str, Callable[[str, Path, Any, argparse.Namespace], None]] = {
    "fineloop": _fineloop,
    "polars": _polars,
    "duckdb": _duckdb,
    "datasets": _datasets,
}


if __name__ == "__main__":
    main()
