"""Training speed and memory against four peers, each in an environment of its own: `make bench`.

transformers' Trainer with peft, TRL's SFTTrainer, LLaMA-Factory and Axolotl train what Fineloop trains (task.py), each
through its own entry point (sides/), in turn, in a process of its own with the same threads. Tokens/s are those of all
steps but the first two; padding does not count. Medians of --rounds.

Each peer counts at its best setting: the first round runs all in SETTINGS, and the others the fastest of each peer. No
peer recomputes activations, and all multiply in float32 where that is the faster here.

On a GPU (--gpu), where Unsloth is one more, a base of the example's size is nothing: --shape takes one of random
weights in the shape of a Llama of 1 to 8 billion.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import baselines, example
from benchmarks.peers import bases, task, venvs

SIDES = Path(__file__).with_name("sides")
# glibc's, as ray_jobs/kernels/door.py sets them for Fineloop.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
# No request goes to a hub, and no telemetry is sent.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled", "AXOLOTL_DO_NOT_TRACK": "1"}
LOSS_TOLERANCE = {"grouped": 0.1, "shuffled": 0.3}
"""Tolerance of the last steps' mean loss, as a share of Fineloop's. Grouped, all take the same batches and rates.
In bfloat16 peers round more often on the way, and Adam's first steps, in which only signs count, take them elsewhere:
by 7 % of the second loss, where Trainer in float32 is within 0.2 % of it. Shuffled, the batches differ."""
FIRST_LOSS_TOLERANCE = 0.01
"""Tolerance of the first step's loss on the same batches: an adapter that has not learned anything adds nothing."""
FINELOOP = "fineloop"


@dataclass(frozen=True)
class Setting:
    """A peer as it is run."""

    peer: str
    order: str = "grouped"
    packed: bool = False
    allocator: bool = True
    """With the settings of glibc's that Fineloop gives itself."""
    runs_on: tuple[str, ...] = ("cpu", "gpu")


SETTINGS = {
    "trainer": Setting("trainer"),
    "trainer padded": Setting("trainer", order="shuffled"),
    "trainer malloc": Setting("trainer", allocator=False, runs_on=("cpu",)),
    "trl": Setting("trl"),
    "trl packed": Setting("trl", order="shuffled", packed=True),
    "llamafactory": Setting("llamafactory"),
    "axolotl": Setting("axolotl"),
    "axolotl packed": Setting("axolotl", order="shuffled", packed=True),
    "unsloth": Setting("unsloth", runs_on=("gpu",)),
}


class SideFailedError(Exception):
    """A side did not print its figures; the message is the end of what it printed."""


def main() -> None:
    parser = example.parser("peers", __doc__, threads=os.cpu_count() or 1, rounds=3, record=True)
    parser.add_argument("--records", type=int, default=320, help="each trained on once")
    parser.add_argument("--records-tokens", type=int, default=0, metavar="T", help="join records to ones of T tokens")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shape", choices=bases.SHAPES, default="", help="random weights, not the example's base")
    parser.add_argument("--gpu", action="store_true", help="train on the GPU")
    parser.add_argument("--only", nargs="+", choices=venvs.PEERS, default=[*venvs.PEERS], help="these peers alone")
    parser.add_argument("--install", action="store_true", help="make the environments and no more")
    options = parser.parse_args()
    here = "gpu" if options.gpu else "cpu"
    sides = [side for side, of in SETTINGS.items() if here in of.runs_on and of.peer in options.only]
    missing = _installed({SETTINGS[side].peer for side in sides})
    if not options.install:
        with tempfile.TemporaryDirectory() as scratch:
            missing |= _measure(options, Path(scratch), [side for side in sides if SETTINGS[side].peer not in missing])
    for name, reason in missing.items():
        print(f"NOT MEASURED  {name}: {reason}")
    sys.exit(1 if unmeasured(sides, missing) else 0)


def unmeasured(sides: list[str], missing: dict[str, str]) -> set[str]:
    """Who has no figure: peers that are missing as such or in all of their settings, and Fineloop where it failed."""
    measured = {SETTINGS[side].peer for side in sides if side not in missing} - set(missing)
    return {SETTINGS[side].peer for side in sides} - measured | set(missing) & {FINELOOP}


def _installed(peers: set[str]) -> dict[str, str]:
    """Install the peers; returns the reason for each that could not be installed."""
    missing = {}
    for name in sorted(peers):
        try:
            venvs.python(name)
        except venvs.NotInstalledError as error:
            missing[name] = str(error)
    return missing


def _measure(options: argparse.Namespace, scratch: Path, sides: list[str]) -> dict[str, str]:
    given = task.write(
        scratch,
        records=options.records,
        batch_size=options.batch_size,
        record_tokens=options.records_tokens,
        threads=options.threads,
        shape=options.shape,
        use_gpu=options.gpu,
    )
    print(
        f"{_kind(options)}, {given['threads']} threads, base nf4, products in {given['dtype']}, "
        f"{given['steps']} steps of {given['batch_size']} records of {given['mean_length']:.0f} tokens",
        flush=True,
    )
    missing: dict[str, str] = {}
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for side in [FINELOOP, *sides]:
            if side in missing:
                continue
            try:
                run = _run(side, given, scratch)
            except SideFailedError as error:
                missing[side] = str(error)
                found.pop(side, None)
                continue
            found.setdefault(side, []).append(run)
            print(f"{side:>16}  {_line(run)}", flush=True)
        if number == 0:
            missing |= others({side: runs[0] for side, runs in found.items()})
            sides = fastest({side: runs[0] for side, runs in found.items() if side not in missing})
    medians = {side: _median(found[side]) for side in [FINELOOP, *sides] if side in found}
    _compare(options, medians)
    return missing


def fastest(found: dict[str, dict[str, float]]) -> list[str]:
    """The fastest setting of each peer."""
    best: dict[str, str] = {}
    for side, run in found.items():
        if side != FINELOOP:
            held = best.setdefault(SETTINGS[side].peer, side)
            if run["tokens_per_s"] > found[held]["tokens_per_s"]:
                best[SETTINGS[side].peer] = side
    return list(best.values())


def others(found: dict[str, dict[str, float]]) -> dict[str, str]:
    """Sides that trained something else than Fineloop, by their loss, and how they differ."""
    ours = found.get(FINELOOP, {"loss": math.nan, "first_loss": math.nan})

    def far(side: str, name: str, tolerance: float) -> bool:
        return not abs(found[side][name] / ours[name] - 1) <= tolerance

    different = {}
    for side in found.keys() - {FINELOOP}:
        order = SETTINGS[side].order
        if order == "grouped" and far(side, "first_loss", FIRST_LOSS_TOLERANCE):
            different[side] = "first_loss"
        elif far(side, "loss", LOSS_TOLERANCE[order]):
            different[side] = "loss"
    return {
        side: f"its {name.replace('_', ' ')} is {found[side][name]:.3f} and Fineloop's {ours[name]:.3f}: "
        "not the same work"
        for side, name in different.items()
    }


def _run(side: str, given: dict[str, Any], scratch: Path) -> dict[str, float]:
    """One side's training, in a process of its own."""
    setting = SETTINGS.get(side, Setting(FINELOOP))
    order = given["orders"][setting.order]
    path = scratch / f"{side.replace(' ', '-')}.json"
    # One row of packed records is what a batch holds on average.
    length = math.ceil(given["batch_size"] * given["mean_length"]) if setting.packed else given["max_length"]
    own = {"rows": order["rows"], "packs": int(setting.packed), "max_length": length}
    path.write_text(json.dumps({**given, **own}), encoding="utf-8")
    environment = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": str(given["threads"])}
    if side == FINELOOP:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.sides.side_fineloop"]
    else:
        environment |= ALLOCATOR if setting.allocator else {}
        command = [str(venvs.python(setting.peer)), "-W", "ignore", str(SIDES / f"side_{setting.peer}.py")]
        environment["PYTHONPATH"] = str(SIDES)
    done = subprocess.run([*command, str(path)], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        output = (done.stderr.strip() or done.stdout.strip())[-1500:]
        raise SideFailedError(f"exit code {done.returncode}: {output}")
    figures: dict[str, float] = json.loads(lines[-1])
    if not setting.packed and figures["steps"] != given["steps"]:
        raise SideFailedError(f"took {figures['steps']} steps of {given['steps']}")
    tokens = order["tokens"]
    if setting.packed:  # its steps are not the batches; all of them together are all records
        tokens = given["mean_length"] * given["steps"] * given["batch_size"] * (1 - given["warm_up"] / figures["steps"])
    return {**figures, "tokens_per_s": tokens / figures["seconds"]}


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _line(run: dict[str, float]) -> str:
    return f"{run['tokens_per_s']:6.0f} tokens/s   {run['peak_mb']:6.0f} MB   loss {run['loss']:.3f}"


def _compare(options: argparse.Namespace, medians: dict[str, dict[str, float]]) -> None:
    """Print the medians and the ratios to each peer and to the best of them."""
    peers = [side for side in medians if side != FINELOOP]
    if FINELOOP not in medians or not peers:
        return
    ours = medians[FINELOOP]
    print(f"medians of {options.rounds}, and Fineloop against each")
    length = f"{options.records_tokens} tokens" if options.records_tokens else ""
    name, kind = " ".join(filter(None, ["peers nf4", options.shape, length])), _kind(options)
    print(f"{FINELOOP:>16}  {_line(ours)}")
    for side in peers:
        run = medians[side]
        ratio, memory = ours["tokens_per_s"] / run["tokens_per_s"], ours["peak_mb"] / run["peak_mb"]
        print(f"{side:>16}  {_line(run)}   {ratio:.2f} x the tokens/s, {memory:.2f} x the memory")
        print(baselines.compared(f"{name}, {SETTINGS[side].peer}", ratio, record=options.record, kind=kind))
    best = max(peers, key=lambda side: medians[side]["tokens_per_s"])
    ratio = ours["tokens_per_s"] / medians[best]["tokens_per_s"]
    memory = ours["peak_mb"] / min(medians[side]["peak_mb"] for side in peers)
    print(f"    ratio  {ratio:.2f} x the tokens/s of the fastest, {best}; {memory:.2f} x the memory of the smallest")
    print(baselines.compared(f"{name}, the fastest", ratio, record=options.record, kind=kind))


def _kind(options: argparse.Namespace) -> str:
    """What it is measured on, as the baselines know it: the kind of processor, or the GPU's name."""
    if not options.gpu:
        return baselines.processor()
    import torch

    return str(torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
