"""How speed and memory change with the length of records and with their number: `make bench`.

Training: the example's records joined to ones of so many tokens, TOKENS of them in a step whatever their length, each
length in a process of its own. Preparing: so many made-up records read, validated, deduplicated, split, tokenised and
put into batches, as the steps before a training do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import baselines
from benchmarks.peak import peak_mb

CONFIG = Path(__file__).parents[1] / "pipelines" / "configs" / "icd10.toml"
TOKENS = 4096
STEPS = 2
"""Steps that count; one before them does not."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096], metavar="TOKENS")
    parser.add_argument("--records", type=int, nargs="*", default=[1_000, 10_000, 100_000], metavar="N")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--record", action="store_true", help="make the ratios this kind of processor's baselines")
    parser.add_argument("--one", choices=("trained", "prepared"), help="measure the first of each here, as JSON")
    options = parser.parse_args()
    if options.one:
        found = (
            _trained(options.lengths[0], options.threads) if options.one == "trained" else _prepared(options.records[0])
        )
        print(json.dumps(found))
        return
    _compare("trained", "tokens", options.lengths, options)
    _compare("prepared", "records", options.records, options)


def _compare(what: str, unit: str, sizes: list[int], options: argparse.Namespace) -> None:
    """Measure each size; the last against the first, per token or record."""
    rates = []
    for size in sizes:
        found = _in_process(what, size, options.threads)
        rates.append(found["rate"])
        print(f"{what} {size:7,} {unit}  {found['rate']:8.0f} {unit}/s   {found['peak_mb']:6.0f} MB", flush=True)
    if len(rates) > 1:
        ratio = rates[-1] / rates[0]
        print(f"    ratio  {ratio:.2f} x the {unit}/s at {sizes[-1]:,} of those at {sizes[0]:,}")
        print(baselines.compared(f"{what} {sizes[-1]} for {sizes[0]} {unit}", ratio, record=options.record))


def _in_process(what: str, size: int, threads: int) -> dict[str, float]:
    sizes = ["--lengths" if what == "trained" else "--records", str(size)]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.growth", "--one", what, *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command += ["--threads", str(threads)]
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _figures(amount: int, seconds: float) -> dict[str, float]:
    return {"rate": amount / seconds, "peak_mb": peak_mb()}


def _trained(length: int, threads: int) -> dict[str, float]:
    import numpy as np
    import torch

    from benchmarks import our_loop
    from benchmarks.peers import task
    from benchmarks.peers.sides import side_fineloop
    from ray_jobs.base import base_model
    from ray_jobs.kernels.door import Kernels
    from ray_jobs.text import chat_format

    torch.set_num_threads(threads)
    batch_size = max(1, TOKENS // length)
    with tempfile.TemporaryDirectory() as scratch:
        given = task.write(
            Path(scratch),
            records=batch_size * (STEPS + 1),
            batch_size=batch_size,
            record_tokens=length,
            labels="answers",
            base_format="nf4",
            matmul_dtype="auto",
            threads=threads,
        )
        config = side_fineloop.config_of(given)
        split = side_fineloop.split_of(given["orders"]["shuffled"]["rows"])
    base = base_model.resolve(config.model)
    engine = our_loop.make(config, base, Kernels(given["dtype"]), dense_base=True)
    plan = list(np.arange(len(split)).reshape(-1, batch_size))
    ended = [
        time.perf_counter()
        for _ in our_loop.steps(engine, config, split, chat_format.load(base, config.model).pad, plan)
    ]
    return _figures(STEPS * batch_size * length, ended[-1] - ended[0])


def _prepared(count: int) -> dict[str, float]:
    from components.config import config_file
    from components.prepare.prepare import preview
    from components.prepare.sources import find_sources
    from ray_jobs import entry
    from ray_jobs.base import base_model
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import plan_epoch, tokenize

    entry.quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "records.jsonl"
        path.write_text("".join(json.dumps(_made_up(number)) + "\n" for number in range(count)), encoding="utf-8")
        config = config_file.load(CONFIG, [f"data.source={path}", "data.max_records=0"])
        chat = chat_format.load(base_model.resolve(config.model), config.model)
        started = time.perf_counter()
        with preview(config, find_sources(config.data.source)) as (_, parts):
            records = list(parts.train)
        split = tokenize(records, chat, config.model.max_length)
        plan_epoch(split.lengths, batch_size=config.train.batch_size, group_by_length=True, seed=0, epoch=0)
        return _figures(count, time.perf_counter() - started)


def _made_up(number: int) -> dict[str, Any]:
    prompt = f"Invoice {number} of customer {number * 7919 % 100_003}: which account does it go to?"
    return {"id": str(number), "prompt": prompt, "completion": f"account {number % 97}"}


if __name__ == "__main__":
    main()
