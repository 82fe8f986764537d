"""The first day on a machine with GPUs, in pieces of below ten minutes each: `python -m benchmarks.gpu_day`.

What no processor can show, most telling first: QLoRA on one GPU and on two, ZeRO-3, DoRA on a 4-bit base under it, a
checkpoint, a kill and what is resumed on fewer GPUs, int8, 8-bit and paged AdamW, offloading, long packed records, the
speed beside each peer that is installed, and after each piece the GPU's peak memory beside what the plan said.

Each piece is a process of its own, and its figures are in --out (JSON) once it has ended: call the command again, and
it goes on with what is missing, was skipped or has failed. A piece passes if its losses are finite and its first one is
that of the first piece, or on long records that of the packed ones: the same records on the same base. `pytest -m gpu
tests/benchmarks` runs the same list.

Without a GPU all of it runs on processors, over a tiny base, so that the command is known to work; memory is then the
plan's alone. On GPUs the base has random weights in the shape of a Llama of 1 to 8 billion (--shape), or is --base.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.example import parser
from benchmarks.peers import venvs

LIMIT_S = 600
GIB = 2**30
BUCKET = "gpu-day"
NEAR = 0.1
"""In nats: how far other kernels and ways of sharing out may move the first step's loss."""
PEERS = ("trainer", "trl", "unsloth")
STEPS, EVERY, KILLED_AFTER = 6, 2, 3


@dataclass(frozen=True)
class Piece:
    """One training, by what sets it apart; or with a `peer` the speed beside it."""

    changes: tuple[str, ...] = ()
    workers: int = 1
    """On GPUs as many of these as there are."""
    min_workers: int = 1
    peer: str = ""
    is_killed: bool = False
    """Killed after a checkpoint, and resumed with one worker."""
    is_long: bool = False
    """On long records with a beginning in common, which are packed; their losses are others."""


QLORA = ("method.name=qlora",)
PIECES = {
    "qlora, ZeRO-2": Piece((*QLORA, "train.zero_stage=2")),
    "qlora, ZeRO-2, two": Piece((*QLORA, "train.zero_stage=2"), workers=2, min_workers=2),
    "qlora, ZeRO-3": Piece((*QLORA, "train.zero_stage=3"), workers=2),
    "qdora, ZeRO-3": Piece(("method.name=qdora", "train.zero_stage=3"), workers=2),
    "killed and resumed": Piece((*QLORA, f"train.checkpoint_every_steps={EVERY}"), workers=2, is_killed=True),
    "int8": Piece(("method.name=lora", "method.base=int8")),
    "8-bit AdamW": Piece((*QLORA, "train.optimizer=adamw_8bit")),
    "paged AdamW": Piece(
        (*QLORA, "train.optimizer=paged_adamw_8bit", f"train.checkpoint_every_steps={EVERY}"), is_killed=True
    ),
    "offloaded": Piece((*QLORA, "train.zero_stage=3", "train.cpu_offload=true"), workers=2),
    "activations offloaded": Piece((*QLORA, "train.gradient_checkpointing=true", "train.activation_offloading=true")),
    **{
        f"long, {how}": Piece((*QLORA, "train.gradient_checkpointing=true", f"model.attention={wanted}"), is_long=True)
        for how, wanted in {"packed": "auto", "apart": "eager", "by flash-attn": "flash_attention_2"}.items()
    },
    **{f"beside {peer}": Piece(peer=peer) for peer in PEERS},
}
FIRST, LONG = next(iter(PIECES)), "long, packed"
NOT_ON_A_PROCESSOR = {
    "train.optimizer=paged_adamw_8bit": "train.optimizer=adamw_8bit",
    "train.activation_offloading=true": "train.activation_offloading=false",
    "model.attention=flash_attention_2": "model.attention=auto",
}
CONFIG = """
[adapter]
name = "gpu-day"
[model]
base = "{base}"
max_length = {max_length}
[data]
source = "unused.jsonl"
[train]
batch_size = 16
micro_batch_size = 4
max_steps = {steps}
checkpoint_every_steps = 0
early_stopping_patience = 0
[registry]
bucket = "{bucket}"
[ray]
use_gpu = {use_gpu}
"""


def main() -> None:
    arguments = parser("gpu_day", __doc__)
    arguments.add_argument("--out", type=Path, default=Path("gpu-day.json"), help="figures so far; goes on from there")
    arguments.add_argument("--base", default="", help="folder of a base; without it random weights")
    arguments.add_argument("--shape", default="1B", choices=("1B", "3B", "8B"), help="of the random weights, on GPUs")
    arguments.add_argument("--only", nargs="+", choices=PIECES, help="these pieces alone, also if they are there")
    arguments.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.piece:
        print(json.dumps(run(PIECES[options.piece], base=options.base, shape=options.shape)), flush=True)
        return
    day = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"pieces": {}}
    day["machine"] = machine()
    for name in options.only or PIECES:
        if options.only is None and day["pieces"].get(name, {}).get("status") == "passed":
            continue
        print(f"{name} ...", flush=True)
        day["pieces"][name] = in_process(name, ["--base", options.base, "--shape", options.shape])
        judge(day["pieces"])
        options.out.write_text(json.dumps(day, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(day)))
    sys.exit(any(found["status"] == "failed" for found in day["pieces"].values()))


def machine() -> dict[str, Any]:
    """What the figures depend on, besides the code."""
    import bitsandbytes
    import deepspeed
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = {package.__name__: package.__version__ for package in (torch, deepspeed, bitsandbytes)}
    return {"gpus": gpus, "cores": os.cpu_count(), **versions, "cuda": torch.version.cuda}


def in_process(name: str, options: Sequence[str]) -> dict[str, Any]:
    """What a piece measured in a process of its own, which is killed with all that it started after LIMIT_S."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_day", "--piece", name, *options]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        try:
            printed, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"status": "failed", "reason": f"took more than {LIMIT_S} s", "seconds": LIMIT_S}
        seconds = round(time.monotonic() - began, 1)
        if process.returncode:
            log.seek(0)
            return {"status": "failed", "reason": log.read()[-3000:], "seconds": seconds}
    return {**json.loads(printed.splitlines()[-1]), "seconds": seconds}


def judge(pieces: dict[str, dict[str, Any]]) -> None:
    """Give each training that ran its status: losses are finite, and the first one is that of the first piece on such
    records."""
    for name, found in pieces.items():
        if "losses" not in found:
            continue
        first, like = found["losses"][0], LONG if PIECES[name].is_long else FIRST
        expected = pieces.get(like, {}).get("losses", [None])[0]
        if not all(math.isfinite(loss) for loss in found["losses"]):
            found |= {"status": "failed", "reason": "a loss is not finite"}
        elif found.get("resumed_apart", 0) > NEAR:
            found |= {"status": "failed", "reason": f"resumed losses lie {found['resumed_apart']:.3f} apart"}
        elif expected is not None and abs(first - expected) > NEAR:
            found |= {"status": "failed", "reason": f"the first loss is {first:.3f}, and {like}'s is {expected:.3f}"}
        else:
            found |= {"status": "passed", "reason": ""}


def table(day: Mapping[str, Any]) -> Iterator[str]:
    """The pieces as text, one a line."""
    yield f"on {', '.join(day['machine']['gpus']) or 'processors'}; torch {day['machine']['torch']}"
    yield f"{'':<24}{'':>9}{'s':>7}{'first loss':>12}{'last':>8}{'tokens/s':>10}{'GiB':>7}{'planned':>9}"
    for name, found in day["pieces"].items():
        row = f"{name:<24}{found['status']:>9}{found.get('seconds', 0):>7.0f}"
        if "losses" in found:
            peak = f"{found['peak_bytes'] / GIB:.2f}" if found["peak_bytes"] else "-"
            row += f"{found['losses'][0]:>12.3f}{found['losses'][-1]:>8.3f}{found['tokens_per_s']:>10,.0f}"
            row += f"{peak:>7}{found['planned_bytes'] / GIB:>9.2f}"
        reason = found.get("reason", "").strip().splitlines()
        yield row + (f"   {reason[-1][:160]}" if reason else "")


def run(piece: Piece, *, base: str, shape: str) -> dict[str, Any]:
    """Run a piece in this process and those that it starts."""
    import torch

    num_gpus = torch.cuda.device_count()
    use_gpu = num_gpus > 0
    if piece.peer:
        return beside(piece.peer, use_gpu=use_gpu, shape=shape)
    if use_gpu and num_gpus < piece.min_workers:
        return {"status": "skipped", "reason": f"needs {piece.min_workers} GPUs, and this machine has {num_gpus}"}
    if "model.attention=flash_attention_2" in piece.changes and not (use_gpu and find_spec("flash_attn")):
        return {"status": "skipped", "reason": "needs a GPU and the package flash-attn"}
    workers = min(piece.workers, num_gpus) if use_gpu else piece.workers
    with tempfile.TemporaryDirectory(prefix="fineloop-gpu-day-") as scratch, a_store(Path(scratch)):
        os.environ["FINELOOP_CACHE"] = f"{scratch}/cache"
        folder = Path(base) if base else made_base(Path(scratch) / "base", shape if use_gpu else "")
        return trained(piece, workers, folder, Path(scratch), use_gpu=use_gpu)


@contextmanager
def a_store(scratch: Path) -> Iterator[None]:
    """An S3 server of this process's own, at which the environment points."""
    from pipelines.local import seaweedfs, server

    running = server.start(seaweedfs.SeaweedFS(scratch / "store", BUCKET))
    os.environ.update(seaweedfs.Endpoint.read(running.endpoint).environment())
    try:
        yield
    finally:
        running.stop()


def made_base(folder: Path, shape: str) -> Path:
    """A base of random weights with a tokenizer of bytes; the tiny one of the tests without a shape."""
    from benchmarks.peers import bases
    from tests.models.tiny import build_base, write_tokenizer

    if not shape:
        return build_base(folder)
    write_tokenizer(folder.with_name("tokenizer"))
    return bases.write(folder, shape, folder.with_name("tokenizer"))


def trained(piece: Piece, workers: int, base: Path, scratch: Path, *, use_gpu: bool) -> dict[str, Any]:
    """A piece's training: losses, speed, and the most that a worker's GPU held beside the plan."""
    from benchmarks.gpu_day import in_rank  # by the name that other processes find it under
    from components.config import config_file
    from ray_jobs.base import base_model
    from ray_jobs.plan import planned
    from ray_jobs.planning import capacity
    from tests.models.train_group import in_group

    changes = piece.changes if use_gpu else [NOT_ON_A_PROCESSOR.get(change, change) for change in piece.changes]
    rows, max_length = rows_of(piece, base)
    toml = CONFIG.format(base=base, max_length=max_length, steps=STEPS, bucket=BUCKET, use_gpu=str(use_gpu).lower())
    config = config_file.loads(toml, [*changes, f"ray.num_workers={workers}"])

    def group(run_id: str, num_workers: int) -> list[dict[str, Any]]:
        mine = config_file.dumps(config.on(num_workers))
        found: list[dict[str, Any]] = in_group(
            in_rank, mine, rows, run_id, directory=scratch / run_id, num_workers=num_workers, use_gpu=use_gpu
        )
        return found

    ranks = group("whole", workers)
    found = ranks[0]
    if piece.is_killed:
        os.environ["STOP_AFTER_STEP"] = str(KILLED_AFTER)
        try:
            group("killed", workers)
        except RuntimeError:
            del os.environ["STOP_AFTER_STEP"]
        resumed = group("killed", 1)[0]
        assert resumed["resumed_from"] == EVERY, resumed
        apart = [abs(a - b) for a, b in zip(resumed["losses"], found["losses"][EVERY:], strict=True)]
        found["resumed_apart"] = max(apart)
    plan = planned(config, base_model.read_config(config.model), capacity.named_device(config))
    found["planned_bytes"] = plan["memory_bytes"]["total"]
    found["peak_bytes"] = max(rank["peak_bytes"] for rank in ranks)
    return {"status": "ran", **found, "workers": workers}


def rows_of(piece: Piece, base: Path) -> tuple[list[dict[str, str]], int]:
    """What a piece trains on, and the context for it."""
    from tests.models.tiny import colour_rows

    rows = colour_rows(128)
    if not piece.is_long:
        return rows, 64
    positions = json.loads((base / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    max_length = min(4096, positions)
    beginning = "The colours of things, as people tell them. " * (max_length // 2 // 44)
    return [{**row, "prompt": beginning + row["prompt"]} for row in rows], max_length


def in_rank(toml: str, rows: list[dict[str, str]], run_id: str) -> dict[str, Any]:
    """A rank's part of a training."""
    import torch

    from components.config import config_file
    from tests.models.train_group import fit_in_rank

    config = config_file.loads(toml)
    ran = fit_in_rank(config, rows, run_id=run_id)
    steps = [record for record in ran.records if record["kind"] == "train"]
    return {
        "losses": [record["loss"] for record in steps],
        "tokens_per_s": statistics.median([record["tokens_per_s"] for record in steps[1:]]),
        "resumed_from": ran.trained.resumed_from,
        "peak_bytes": torch.cuda.max_memory_reserved() if config.ray.use_gpu else 0,
    }


def beside(peer: str, *, use_gpu: bool, shape: str) -> dict[str, Any]:
    """Tokens a second beside a peer's on the same records, where its environment has been installed."""
    if not (venvs.folder() / peer / "ready").is_file():
        return {"status": "skipped", "reason": f"not installed: python -m benchmarks.peers --install --only {peer}"}
    if peer == "unsloth" and not use_gpu:
        return {"status": "skipped", "reason": "needs a GPU"}
    here = ["--gpu", "--shape", shape] if use_gpu else ["--shape", "tiny", "--records", "96"]
    command = [sys.executable, "-m", "benchmarks.peers", "--rounds", "1", "--only", peer, *here]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    status = "failed" if done.returncode else "passed"
    lines = [line.strip() for line in done.stdout.splitlines()]
    reason = next((line for line in lines if line.startswith("ratio")), f"exit status {done.returncode}")
    return {"status": status, "reason": reason, "printed": done.stdout}


if __name__ == "__main__":
    main()
