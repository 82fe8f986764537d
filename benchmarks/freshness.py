"""What a refresh is worth on a domain that really moved: `python -m benchmarks.freshness FOLDER`.

ICD-10-CM of January 2021 against April 2025. Each seed draws which terms are held out, new ones and old ones, and
trains five adapters by the example's recipe: one on terms of 2021, which is stale by 2025; from that one on, new terms
alone, and with as many earlier terms replayed; anew from the base, all of these; and from the stale one on, as many
terms of 2021 that it had not seen, which shows what more training alone brings. Terms near a held-out one are not
trained on, as the prepare step leaves them out. Bounds are the gate's own, paired by record. What FOLDER holds is not
trained again, and with --replay nothing is: the new terms arrive a few a night, and `fineloop adapters check` looks.
"""

import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import example, our_loop
from components.config import config_file
from components.gate.check import judge, records_for_rare
from components.prepare import icd10
from components.prepare.dataset import Record
from components.prepare.near_duplicates import Comparison
from components.shared.paired import Bounds, Pairs, bounds
from pipelines.configs import DEFAULT_CONFIG
from ray_jobs.kernels import door, float32_layers
from ray_jobs.probes.texts import unread_passages
from ray_jobs.scoring.generation import label_nll, score
from ray_jobs.scoring.measure import BaseCache
from ray_jobs.text.batching import plan_epoch, tokenize
from ray_jobs.training import opening, zero
from tests.doubles.datasets import validate

BEFORE, AFTER = "example://icd10/2021-01", "example://icd10/2025-04"
STALE, OLD, NEW, REPLAYED, ANEW = "stale", "old terms alone", "new terms alone", "with replay", "from the base"
ARMS = (STALE, OLD, NEW, REPLAYED, ANEW)
GATE = config_file.load(DEFAULT_CONFIG).gate
MARGIN = GATE.worse_than_champion_by

Values = dict[str, list[float]]


@dataclass(frozen=True)
class Draw:
    """The terms of one seed."""

    held_new: list[Record]
    held_old: list[Record]
    new: list[Record]
    old: list[Record]
    more_old: list[Record]

    @classmethod
    def of(cls, seed: int, *, share: float) -> "Draw":
        """Such a share of the terms of each kind, as far as there are."""
        new, old, held_new, held_old = (round(share * count) for count in (240, 480, 160, 120))
        chance = random.Random(seed)
        added, listed = ([validate(row).record for row in icd10.rows(address)] for address in (AFTER, BEFORE))
        chance.shuffle(added)
        chance.shuffle(listed)
        held = added[:held_new], listed[:held_old]
        prompts = [record.prompt[-1].content for record in (*held[0], *held[1])]

        def unlike(records: Sequence[Record]) -> list[Record]:
            texts = [record.prompt[-1].content for record in records]
            similarity = config_file.load(DEFAULT_CONFIG).data.near_duplicates
            with tempfile.TemporaryDirectory() as scratch:
                comparison = Comparison(texts, prompts, similarity=similarity, folder=Path(scratch))
                near = list(comparison.near_held_out(texts))
            return [record for record, row in zip(records, near, strict=True) if row is None]

        least = old + 2 * new
        others = unlike(listed[held_old : held_old + 2 * least])[:least]
        return cls(*held, unlike(added[held_new:])[:new], others[:old], others[old:])

    def trained_on(self, arm: str) -> list[Record]:
        return {
            STALE: self.old,
            OLD: self.more_old,
            NEW: self.new,
            REPLAYED: [*self.new, *self.old[: len(self.new)]],
            ANEW: [*self.new, *self.old],
        }[arm]


class Trainer:
    """Trains and measures in this process, on one base."""

    def __init__(self, *, threads: int) -> None:
        one = ("ray.num_workers=1", "train.micro_batch_size=16", f"ray.cpus_per_worker={threads}")
        self.config, self.base, self.chat, _, self.kernels = example.parts(threads, *one)
        self.cache = BaseCache()
        zero.prepare_environment(use_gpu=False)
        door.keep_freed_memory()
        our_loop.join("gloo")

    def train(self, records: Sequence[Record], seed: int, start: Mapping[str, torch.Tensor] | None) -> Any:
        """The adapted model with its last weights."""
        config = config_file.loads(config_file.dumps(self.config), [f"train.seed={seed}"])
        adapted = opening.assemble(
            config, self.base, use_gpu=False, kernels=self.kernels, load=self.cache.load, start=start
        )
        engine = zero.initialize(adapted, config)
        float32_layers.widen(adapted, self.kernels.dtype)
        split = tokenize(records, self.chat, config.model.max_length)
        plan = plan_epoch(split.lengths, batch_size=config.train.batch_size, seed=seed, epoch=0)
        for _ in our_loop.steps(engine, config, split, self.chat.pad, plan):
            pass
        engine.destroy()
        return adapted.eval()

    def measure(self, model: Any, records: Sequence[Record]) -> Values:
        split = tokenize(records, self.chat, self.config.model.max_length)
        found = score(model, self.chat, records, split, batch_size=32, max_new_tokens=8)
        return {
            "loss": [each.nll for each in found],
            "exact_match": [each.marks["exact_match"] for each in found],
            "tokens": split.num_answer_tokens.tolist(),
        }

    @cached_property
    def passages(self) -> Any:
        return unread_passages(self.chat, self.config).split

    def general(self, model: Any) -> Values:
        return {
            "loss": label_nll(model, self.passages, 16, self.chat.pad),
            "tokens": self.passages.num_answer_tokens.tolist(),
        }


def main() -> None:
    parser = example.parser("freshness", __doc__, threads=torch.get_num_threads())
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for what was measured, and the stale adapters")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the terms; less to try the command")
    parser.add_argument("--replay", action="store_true", help="say what checks each night would have said")
    options = parser.parse_args()
    if options.replay:
        replay(options.folder, options.seeds, a_night=20)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    trainer: Trainer | None = None
    for seed, arm in product(range(options.seeds), ARMS):
        if not _file(options.folder, seed, arm).exists():
            trainer = trainer or Trainer(threads=options.threads)
            _run(trainer, options.folder, seed, arm, Draw.of(seed, share=options.share))
    report(options.folder, options.seeds)


def _file(folder: Path, seed: int, arm: str) -> Path:
    return folder / f"{seed}-{arm.replace(' ', '-')}.json"


def _run(trainer: Trainer, folder: Path, seed: int, arm: str, draw: Draw) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    stale, records = folder / f"{seed}-stale.safetensors", draw.trained_on(arm)
    began = time.process_time()
    model = trainer.train(records, seed, load_file(stale) if arm in (OLD, NEW, REPLAYED) else None)
    seconds = time.process_time() - began  # of one processor, whatever else it does
    if arm == STALE:
        save_file({name: value.clone() for name, value in get_peft_model_state_dict(model).items()}, stale)
    found = {
        "seed": seed, "arm": arm, "records": len(records), "seconds": round(seconds, 1),
        "new": trainer.measure(model, draw.held_new), "old": trainer.measure(model, draw.held_old),
        "general": trainer.general(model),
    }  # fmt: skip
    _file(folder, seed, arm).write_text(json.dumps(found))
    taken = time.process_time() - began
    print(f"seed {seed}, {arm}: {len(records)} records, {seconds:.0f} s; measured in {taken - seconds:.0f}", flush=True)


def paired(ours: Values, theirs: Values, metric: str) -> Pairs:
    is_loss = metric == "loss"
    weights = np.array(ours["tokens"], float) if is_loss else np.ones(len(ours[metric]))
    return Pairs(np.array(ours[metric]), np.array(theirs[metric]), weights, lower_is_better=is_loss)


def compared(ours: Values, theirs: Values, metric: str) -> Bounds:
    """How much better, positive is better, with one-sided bounds at the gate's confidence."""
    found = bounds(paired(ours, theirs, metric), GATE.confidence)
    assert found is not None
    return found


def worse_after(pairs: Pairs, order: "np.typing.NDArray[np.int64]", *, a_night: int, largest: float) -> float:
    """After how many records, which arrive in this order, a look calls ours worse; infinite where none does."""
    for count in range(a_night, len(order) + 1, a_night):
        arrived = np.isin(np.arange(len(order)), order[:count])
        fewest = {"least": GATE.min_records, "for_rare": records_for_rare(GATE, 1.0)}
        judged = judge(pairs.where(arrived), GATE.total_budget, GATE.confidence, **fewest, largest=largest)
        if judged.verdict == "worse":
            return count
    return float("inf")


def replay(folder: Path, seeds: int, *, a_night: int, replays: int = 200) -> None:
    """Print for each seed that FOLDER holds after how many new terms a look calls the stale adapter worse than the
    refreshed one, and in how many replays any look calls the refreshed one worse than the stale one."""
    print(f"{replays} replays a seed, {a_night} new terms a night")
    print("| seed | metric | new terms | stale is worse after | in replays | the refreshed one is worse in replays |")
    print("|---|---|---|---|---|---|")
    for seed in range(seeds):
        files = [_file(folder, seed, arm) for arm in (STALE, REPLAYED)]
        if not all(file.exists() for file in files):
            continue
        stale, fresh = (json.loads(file.read_text())["new"] for file in files)
        for metric, largest in (("exact_match", 1.0), ("loss", 0.0)):
            told: list[list[float]] = []
            for ours, theirs in ((stale, fresh), (fresh, stale)):
                pairs, chance = paired(ours, theirs, metric), np.random.default_rng(seed)
                orders = [chance.permutation(len(pairs.ours)) for _ in range(replays)]
                told.append([worse_after(pairs, order, a_night=a_night, largest=largest) for order in orders])
            of_stale, of_fresh = (int(np.isfinite(each).sum()) for each in told)
            median = np.quantile(told[0], 0.5, method="higher")
            cells = (seed, metric, len(stale["tokens"]), f"{median:.0f}", of_stale, of_fresh)
            print(f"| {' | '.join(map(str, cells))} |")


def report(folder: Path, seeds: int) -> None:
    """Print a table of gains over the stale adapter, and how often they are shown."""
    draws = [{arm: json.loads(_file(folder, seed, arm).read_text()) for arm in ARMS} for seed in range(seeds)]
    print("| seed | adapter | records | s | new terms | gain | of nats | old terms | gain | of nats | general text |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for arms, arm in product(draws, ARMS):
        measured, general = arms[arm], arms[arm]["general"]
        cells = [f"{measured['seed']}", arm, f"{measured['records']}", f"{measured['seconds']:.0f}"]
        for part in ("new", "old"):
            gains = [compared(measured[part], arms[STALE][part], metric) for metric in ("exact_match", "loss")]
            cells.append(f"{np.mean(measured[part]['exact_match']):.1%}")
            cells += [f"{gain.gain:+.3f} ({gain.lower:+.3f})" for gain in gains]
        print(f"| {' | '.join(cells)} | {sum(general['loss']) / sum(general['tokens']):.3f} |")
    print("Gains over the stale adapter; in brackets, what the gain is at least, at the gate's confidence.")
    for arm, (part, least), other in product(ARMS[1:], (("new", 0.0), ("old", -MARGIN)), (STALE, OLD)):
        if arm != other:
            marks, nats = (
                sum(compared(arms[arm][part], arms[other][part], metric).lower > least for arms in draws)
                for metric in ("exact_match", "loss")
            )
            shown = f"exact match in {marks} of {seeds} seeds, by loss in {nats}"
            print(f"{arm} over {other}, {part} terms: more than {least:+g} by {shown}")


if __name__ == "__main__":
    main()
