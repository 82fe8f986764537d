"""How far two trainings of one recipe lie apart, and what brings them nearer.

`python -m benchmarks.noise FOLDER [--steps N] [--seeds N] [--rates R ...] [--minutes N]`

Trains the example's real model with several seeds, from the base and from a version in production, at each rate, and
measures the held-out losses of the last weights, of averages of them, of seeds that are joined into one adapter, and
of weights half way between production and what was trained from there (Wortsman et al., arXiv:2109.01903).
Each training leaves a file in FOLDER, so that a call goes on where the one before it ended (`--minutes`); the last
prints the table. Spread is the standard deviation of the loss over seeds; distance that of the difference of two
seeds record by record, in nats per token, with what they differ by on the whole taken off.
"""

import argparse
import itertools
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from components.config import config_file
from components.prepare.rows import example_rows
from components.shared.paired import Array, Pairs, bounds
from tests.doubles.datasets import validate

CONFIG = Path(__file__).parents[1] / "pipelines" / "configs" / "icd10.toml"
HELD_OUT, BATCH, RANK = 300, 16, 16
RATES = (1e-3, 4e-4)
NIGHTS = 2
"""Trainings in a row, the first from the base, that make what is in production."""
FIRST_NIGHT = 100
"""The seed of the first of them, far from those that are compared."""
SEEDS = 6
STARTS = ("base", "production")
JOINED = (2, 3)
HALF_WAY = "half way"
UNFINISHED = "not finished: the same call continues"
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Training:
    start: str
    """base, production, or the name of the training that it goes on from."""
    rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.start}-{self.rate:g}-{self.steps}-{self.seed}"


@dataclass
class Average:
    """A running mean of what is trained."""

    window: float
    """In steps; of an exponential mean, its time constant."""
    exponential: bool
    first: int = 0
    taken: int = 0

    def add(self, step: int, held: list[torch.Tensor], masters: list[torch.Tensor]) -> None:
        if step < self.first:
            return
        self.taken += 1
        # Of an exponential mean, the part of the newest so that all before it sum to one, as Adam's moments are.
        part = 1 / self.taken
        if self.exponential:
            decay = 1 - 1 / self.window
            part = (1 - decay) / (1 - decay**self.taken)
        for average, master in zip(held, masters, strict=True):
            average.lerp_(master, part)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=96, help=f"optimizer steps of {BATCH} records")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further training after so many")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    if not train_missing(train, plan(options.steps, options.seeds, options.rates), options.folder, ends=ends):
        return
    for joined in [1, *(each for each in JOINED if each * 2 <= options.seeds)]:
        if time.monotonic() > ends:
            print(UNFINISHED, flush=True)
            return
        if not joined_file(
            options.folder, joined, *list(itertools.product(STARTS, options.rates))[-1], options.steps
        ).exists():
            in_a_process(join, joined, options.steps, options.seeds, options.rates, options.folder)
    show(options.folder, options.steps, options.seeds, options.rates)


def train_missing(
    function: Callable[..., None], trainings: Iterable[Any], folder: Path, *, ends: float = float("inf")
) -> bool:
    """Call `function` for each training without a file NAME.json in the folder, each in a process of its own.

    False if the monotonic clock passed `ends` before all were begun.
    """
    for training in trainings:
        if not (folder / f"{training.name}.json").exists():
            if time.monotonic() > ends:
                print(UNFINISHED, flush=True)
                return False
            in_a_process(function, training, folder)
    return True


def in_a_process(function: Callable[..., None], *arguments: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments, daemon=True)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} ended with {process.exitcode}")


def joined_file(folder: Path, joined: int, start: str, rate: float, steps: int) -> Path:
    return folder / f"joined{joined}-{start}-{rate:g}-{steps}.json"


def nights(steps: int) -> list[Training]:
    """The trainings that lead to the version in production, in their order."""
    found = [Training("base", RATES[0], FIRST_NIGHT, steps)]
    while len(found) < NIGHTS:
        found.append(Training(found[-1].name, RATES[0], FIRST_NIGHT + len(found), steps))
    return found


def plan(steps: int, seeds: int, rates: Sequence[float]) -> Iterator[Training]:
    yield from nights(steps)
    for seed, rate, start in itertools.product(range(seeds), rates, STARTS):
        yield Training(start, rate, seed, steps)


def train(training: Training, folder: Path) -> None:
    """Leaves the losses of each kind of weights, and the last weights."""
    from benchmarks import our_loop
    from ray_jobs import entry
    from ray_jobs.base import base_model
    from ray_jobs.kernels import door
    from ray_jobs.scoring.generation import label_nll
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import plan_epoch, tokenize
    from ray_jobs.training import checkpoint, zero

    entry.quiet_libraries()
    started = time.monotonic()
    config = _config(training.rate, training.seed, training.steps)
    base = base_model.resolve(config.model)
    chat = chat_format.load(base, config.model)
    split, held_out = (tokenize(part, chat, config.model.max_length) for part in _records(training.steps))
    kernels = door.choose(config, base_model.load_config(base.path, config.model))
    engine = our_loop.make(config, base, kernels, dense_base=True)
    if training.start != "base":
        start = nights(training.steps)[-1].name if training.start == "production" else training.start
        weights = load_file(folder / f"{start}.safetensors")
        checkpoint.copy_weights(weights, engine.module)
        engine.optimizer.refresh_fp32_params()
    masters = [master for master, _ in zero.master_partitions(engine)]
    pieces = checkpoint.here(engine, checkpoint.trainable(engine.module))
    steps = training.steps
    averages = {
        "mean over 1/8": Average(max(2, steps / 8), exponential=True),
        "mean over 1/4": Average(max(2, steps / 4), exponential=True),
        "mean of the last half": Average(0, exponential=False, first=steps // 2),
    }
    held = {name: [torch.zeros_like(master) for master in masters] for name in averages}
    batches = plan_epoch(split.lengths, batch_size=BATCH, group_by_length=True, seed=training.seed, epoch=0)[:steps]
    for step, _ in enumerate(our_loop.steps(engine, config, split, chat.pad, batches)):
        for name, average in averages.items():
            average.add(step, held[name], masters)
    trained_s = time.monotonic() - started
    found = {}
    for name, flat in {"last": masters, **held}.items():
        shapes = {key: parameter.shape for key, parameter in checkpoint.trainable(engine.module).items()}
        weights = {
            piece.name: flat[piece.partition][piece.offset : piece.offset + piece.size].view(shapes[piece.name]).clone()
            for piece in pieces
        }
        checkpoint.copy_weights(weights, engine.module)
        with torch.inference_mode():
            found[name] = label_nll(engine.module.eval(), held_out, BATCH, chat.pad)
        if name == "last":
            save_file(weights, folder / f"{training.name}.safetensors")
    _write(folder / f"{training.name}.json", found, held_out.num_answer_tokens)
    print(
        f"{training.name}: loss {sum(found['last']) / held_out.num_answer_tokens.sum():.4f}, trained in "
        f"{trained_s:.0f} s, in all {time.monotonic() - started:.0f} s, {time.process_time():.0f} s of CPU",
        flush=True,
    )


def join(joined: int, steps: int, seeds: int, rates: Sequence[float], folder: Path) -> None:
    """The losses of the mean of several seeds' updates, which is one adapter of so many times the rank.

    Of one seed alone, of the mean of its weights and production's: trained from there, they lie in one basin.
    """
    from ray_jobs import entry
    from ray_jobs.adapters import build
    from ray_jobs.base import base_model
    from ray_jobs.kernels import door
    from ray_jobs.scoring.generation import label_nll
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import tokenize
    from ray_jobs.training import checkpoint, zero

    entry.quiet_libraries()
    zero.prepare_environment(use_gpu=False)
    door.keep_freed_memory()
    config = _config(RATES[0], 0, steps, rank=joined * RANK)
    base = base_model.resolve(config.model)
    chat = chat_format.load(base, config.model)
    held_out = tokenize(_records(steps)[1], chat, config.model.max_length)
    kernels = door.choose(config, base_model.load_config(base.path, config.model))
    model = door.load_model(base, config.model, config.method.row.base, kernels, use_gpu=False)
    adapted = kernels.adopt(build.attach(model, config.method, base_reference="bench", seed=0)).eval()
    build.to_training(adapted, torch.bfloat16)
    kernels.hold_dense(adapted)
    production = load_file(folder / f"{nights(steps)[-1].name}.safetensors")
    for start, rate in itertools.product(STARTS if joined > 1 else STARTS[1:], rates):
        found = {}
        for first in range(0, seeds - joined + 1, joined):
            names = [Training(start, rate, seed, steps).name for seed in range(first, first + joined)]
            parts = [load_file(folder / f"{name}.safetensors") for name in names]
            half_way = {name: (weight + production[name]) / 2 for name, weight in parts[0].items()}
            checkpoint.copy_weights(mean_update(parts) if joined > 1 else half_way, adapted)
            with torch.inference_mode():
                found[str(first)] = label_nll(adapted, held_out, BATCH, chat.pad)
        _write(joined_file(folder, joined, start, rate, steps), found, held_out.num_answer_tokens)


def mean_update(parts: list[Weights]) -> Weights:
    """(B1 A1 + B2 A2) / 2 is [B1 B2] / 2 times A1 over A2; alpha over rank stays."""
    return {
        name: torch.cat([part[name] for part in parts], dim=0)
        if "lora_A" in name
        else torch.cat([part[name] for part in parts], dim=1) / len(parts)
        for name in parts[0]
    }


def show(folder: Path, steps: int, seeds: int, rates: Sequence[float]) -> None:
    """The table."""
    tokens, production = _read(folder / f"{nights(steps)[-1].name}.json")
    print(f"production: loss {production['last'].sum() / tokens.sum():.4f}\n")
    print("| from | rate | weights | loss | spread | distance | to production | loss against last, 95 % at most |")
    print("|---|---|---|---|---|---|---|---|")
    for start, rate in itertools.product(STARTS, rates):
        runs = [_read(folder / f"{Training(start, rate, seed, steps).name}.json")[1] for seed in range(seeds)]
        kinds = {name: [run[name] for run in runs] for name in runs[0]}
        for joined in [each for each in JOINED if each * 2 <= seeds]:
            of_joined = _read(joined_file(folder, joined, start, rate, steps))[1]
            kinds[f"{joined} seeds joined"] = list(of_joined.values())
        if start == "production":
            kinds[HALF_WAY] = list(_read(joined_file(folder, 1, start, rate, steps))[1].values())
        last = np.mean(kinds["last"], axis=0)
        for name, found in kinds.items():
            row = " | ".join(_figures(found, last, production["last"], tokens))
            print(f"| {start} | {rate:g} | {name} | {row} |", flush=True)


def _figures(found: list[Array], last: Array, production: Array, tokens: Array) -> Iterator[str]:
    losses = [nll.sum() / tokens.sum() for nll in found]
    yield f"{np.mean(losses):.4f}"
    yield f"{np.std(losses, ddof=1):.4f}"
    yield f"{np.mean([distance(one, other, tokens) for one, other in itertools.combinations(found, 2)]):.4f}"
    yield f"{np.mean([distance(one, production, tokens) for one in found]):.4f}"
    between = bounds(Pairs(np.mean(found, axis=0), last, tokens, lower_is_better=True), 0.95)
    assert between is not None
    yield f"{-between.gain:+.4f}, {-between.lower:+.4f}"


def distance(one: Array, other: Array, tokens: Array) -> float:
    """As the gate's error of the gain is, times the root of the records."""
    found = bounds(Pairs(one, other, tokens, lower_is_better=True), 0.5)
    assert found is not None
    return found.error * float(np.sqrt(len(tokens)))


def _config(rate: float, seed: int, steps: int, rank: int = RANK) -> Any:
    settings = {
        "train.learning_rate": rate,
        "train.seed": seed,
        "train.max_steps": steps,
        "ray.num_workers": 1,
        "method.rank": rank,
        "method.alpha": 2 * rank,
    }
    return config_file.load(CONFIG, [f"{key}={value}" for key, value in settings.items()])


def _records(steps: int) -> tuple[list[Any], list[Any]]:
    """To train on and held out."""
    rows = random.Random(0).sample(list(example_rows()), steps * BATCH + HELD_OUT)
    records = [validate(row).record for row in rows]
    return records[HELD_OUT:], records[:HELD_OUT]


def _write(file: Path, found: Mapping[str, list[float]], tokens: Any) -> None:
    file.write_text(json.dumps({"tokens": [int(each) for each in tokens], "nll": found}))


def _read(file: Path) -> tuple[Array, dict[str, Array]]:
    said = json.loads(file.read_text())
    return np.array(said["tokens"], dtype=float), {name: np.array(nll) for name, nll in said["nll"].items()}


if __name__ == "__main__":
    main()
