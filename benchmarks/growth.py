"""How speed and memory of a training change with the length of records: `make bench`.

The example's records joined to ones of so many tokens, TOKENS of them in a step whatever their length, each length in a
process of its own.
"""

import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks import baselines, example

TOKENS = 4096
STEPS = 2
"""Steps that count; one before them does not."""


def main() -> None:
    parser = example.parser("growth", __doc__, threads=os.cpu_count() or 1, record=True)
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096], metavar="TOKENS")
    parser.add_argument("--one", action="store_true", help="measure the first here, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_trained(options.lengths[0], options.threads)))
        return
    rates = []
    for length in options.lengths:
        found = example.in_process("growth", ["--one", "--lengths", str(length)], threads=options.threads)
        rates.append(found["rate"])
        print(f"{length:7,} tokens  {found['rate']:8.0f} tokens/s   {found['peak_mb']:6.0f} MB", flush=True)
    if len(rates) > 1:
        first, *_, last = options.lengths
        ratio = rates[-1] / rates[0]
        print(f"    ratio  {ratio:.2f} x the tokens/s at {last:,} of those at {first:,}")
        print(baselines.compared(f"trained {last} for {first} tokens", ratio, record=options.record))


def _trained(length: int, threads: int) -> dict[str, float]:
    import numpy as np
    import torch

    from benchmarks import our_loop
    from benchmarks.peers import task
    from benchmarks.peers.sides import measured, side_fineloop
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
            threads=threads,
        )
        config = side_fineloop.config_of(given)
        split = side_fineloop.split_of(measured.rows(given["orders"]["shuffled"]))
    base = base_model.resolve(config.model)
    engine = our_loop.make(config, base, Kernels(given["dtype"]), dense_base=True)
    plan = list(np.arange(len(split)).reshape(-1, batch_size))
    ended = [
        time.perf_counter()
        for _ in our_loop.steps(engine, config, split, chat_format.load(base, config.model).pad, plan)
    ]
    return {"rate": STEPS * batch_size * length / (ended[-1] - ended[0]), "peak_mb": example.peak_mb()}


if __name__ == "__main__":
    main()
