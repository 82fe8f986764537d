"""Training speed and memory against transformers' Trainer with peft, as a ratio: `make bench`.

Both sides run in turn, each in a process of its own with the same threads: QLoRA of rank 16 on every linear layer of
the example's base, the same records, batches of 16 grouped by length, AdamW. Padding does not count as tokens.

--processor takes instructions away from PyTorch and oneDNN, so that an older processor's speed can be seen on any that
has more: avx2 (most laptops; Zen 2 and 3) or avx512 (Cascade Lake). bitsandbytes' own kernels keep what they find, and
PyTorch's product of two bfloat16 matrices in rows and columns stays up to thirty times as fast as a true AVX2's.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import baselines, example

WARM_UP_STEPS = 2
BATCH_SIZE = 16
SIDES = ("fineloop", "trainer")
# What oneDNN and PyTorch read to use fewer instructions than there are.
PROCESSORS = {
    "here": {},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}


def main() -> None:
    parser = example.parser("training", __doc__, threads=os.cpu_count() or 1, rounds=2, record=True)
    parser.add_argument("--records", type=int, default=320)
    parser.add_argument("--processor", choices=PROCESSORS, default="here", help="as if it could do no more than this")
    dtypes = ("auto", "bfloat16", "float32")
    parser.add_argument("--matmul-dtype", choices=dtypes, default="auto", help="of both sides; as ray.cpu_matmul_dtype")
    shared_out = "our loop alone, its threads shared out over so many processes; each against the first, such as 1 2"
    parser.add_argument("--workers", type=int, nargs="+", metavar="N", help=shared_out)
    parser.add_argument("--side", choices=SIDES, help="run one side here and print its figures as JSON")
    options = parser.parse_args()
    if options.side:
        print(json.dumps((_fineloop if options.side == "fineloop" else _trainer)(options)))
        return
    print(f"processor {options.processor}, {options.threads} threads, products in {options.matmul_dtype}", flush=True)
    if options.workers:
        _compare_workers(options)
    else:
        _compare_sides(options)


def _compare_sides(options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            found[side].append(_in_processes(side, options))
            print(f"{side:>9}  {_line(found[side][-1])}", flush=True)
    best = {side: max(runs, key=lambda run: run["tokens_per_s"]) for side, runs in found.items()}
    ratio = best["fineloop"]["tokens_per_s"] / best["trainer"]["tokens_per_s"]
    memory = best["fineloop"]["peak_mb"] / best["trainer"]["peak_mb"]
    print(f"    ratio  {ratio:.2f} x the tokens/s, {memory:.2f} x the memory of transformers' Trainer with peft")
    print(baselines.compared(_name(options), ratio, record=options.record))


def _compare_workers(options: argparse.Namespace) -> None:
    best: dict[int, float] = {}
    for _ in range(options.rounds):
        for num_workers in options.workers:
            run = _in_processes("fineloop", options, num_workers)
            best[num_workers] = max(run["tokens_per_s"], best.get(num_workers, 0.0))
            print(f"{num_workers:>3} workers  {_line(run)}", flush=True)
    first, *others = options.workers
    for num_workers in others:
        ratio, name = best[num_workers] / best[first], f"{_name(options)}, {num_workers} workers for {first}"
        print(f"    ratio  {ratio:.2f} x the tokens/s with {num_workers} workers for {first}, as many threads in all")
        print(baselines.compared(name, ratio, record=options.record))


def _name(options: argparse.Namespace) -> str:
    """What was measured, as the baselines know it."""
    name = "training nf4" if options.processor == "here" else f"training nf4 as {options.processor}"
    return name if options.matmul_dtype == "auto" else f"{name} {options.matmul_dtype}"


def _in_processes(side: str, options: argparse.Namespace, num_workers: int = 1) -> dict[str, float]:
    """What the first of so many processes found, which share out the threads."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training", "--side", side]
    threads = str(max(1, options.threads // num_workers))
    command += ["--records", str(options.records), "--threads", threads]
    command += ["--matmul-dtype", options.matmul_dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": threads, **PROCESSORS[options.processor]}
    ranks = [
        subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, **group},
            text=True,
        )
        for rank, group in enumerate(_groups(num_workers))
    ]
    output, _ = ranks[0].communicate()
    if any([rank.wait() for rank in ranks]):
        raise SystemExit(f"{side} failed: run it by itself with --side {side}")
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def _groups(num_workers: int) -> list[dict[str, str]]:
    """What each of several processes needs to find the others; one by itself needs nothing."""
    if num_workers == 1:
        return [{}]
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1]), "WORLD_SIZE": str(num_workers)}
    return [{**at, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_workers)]


def _line(run: dict[str, float]) -> str:
    return f"{run['tokens_per_s']:6.0f} tokens/s   {run['peak_mb']:6.0f} MB   loss {run['loss']:.3f}"


def _parts(options: argparse.Namespace) -> tuple[Any, Any, Any, Any, Any]:
    """Config, base, its chat format, tokenised records and what to multiply in, the same for both sides."""
    from ray_jobs.text.batching import tokenize

    num_workers = int(os.environ.get("WORLD_SIZE", "1"))
    config, base, chat, records, kernels = example.parts(
        options.threads,
        f"ray.num_workers={num_workers}",
        f"train.micro_batch_size={BATCH_SIZE // num_workers}",
        f"ray.cpus_per_worker={options.threads}",
        f"ray.cpu_matmul_dtype={options.matmul_dtype}",
        "method.base=nf4",
    )
    return config, base, chat, tokenize(records[: options.records], chat, config.model.max_length), kernels


def _figures(tokens: int, seconds: float, loss: float) -> dict[str, float]:
    return {"tokens_per_s": tokens / seconds, "peak_mb": example.peak_mb(), "loss": loss}


def _fineloop(options: argparse.Namespace) -> dict[str, float]:
    from benchmarks import our_loop
    from ray_jobs.text.batching import plan_epoch

    config, base, chat, split, kernels = _parts(options)
    engine = our_loop.make(config, base, kernels, dense_base=True)
    plan = plan_epoch(split.lengths, batch_size=BATCH_SIZE, group_by_length=True, seed=0, epoch=0)
    tokens, started, losses = 0, 0.0, []
    for step, (loss, seen) in enumerate(our_loop.steps(engine, config, split, chat.pad, plan)):
        losses.append(loss)
        tokens += seen
        if step == WARM_UP_STEPS - 1:
            started, tokens = time.perf_counter(), 0
    return _figures(tokens, time.perf_counter() - started, losses[-1])


def _trainer(options: argparse.Namespace) -> dict[str, float]:
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from benchmarks.peers.sides import measured
    from ray_jobs.kernels import float32_layers

    config, base, chat, split, kernels = _parts(options)
    model = measured.base({"base": base.path, "dtype": "bfloat16", "gpu": False})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    if kernels.dtype == "float32":  # the same products for both, so that the loops are compared
        float32_layers.multiply_in_float32(model)
    clock = measured.Clock()
    # In float32, autocast would take the products back to bfloat16.
    given = {"batch_size": BATCH_SIZE, "learning_rate": config.learning_rate, "dtype": kernels.dtype, "gpu": False}
    arguments = {**measured.arguments(given), "warmup_steps": 1, "train_sampling_strategy": "group_by_length"}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=scratch, **arguments),
            train_dataset=example.rows(split),
            data_collator=DataCollatorForSeq2Seq(chat.tokenizer),
            callbacks=[clock],
        )
        trainer.train()
    steps = len(clock.ended)
    tokens = int(split.lengths.sum() * (steps - WARM_UP_STEPS) / steps)
    return _figures(tokens, clock.ended[-1] - clock.ended[WARM_UP_STEPS - 1], clock.losses[-1])


if __name__ == "__main__":
    main()
