"""What a second and a third domain cost the first, by what is replayed of it.

`python -m benchmarks.replaying FOLDER [--order NAME NAME NAME] [--replayed NAME ...] [--steps N] [--seeds N]
[--shares P ...]`

The example's real model learns three domains in turn, each training from the version before, as with
`train.start_from = "production"`. Of a training's records a share is replayed from the domains before: none, the
records as they are, the same with the answers of the version before where these are right (production: what a run
with that `data.replay_from` does), or right answers alone, to further records where some are wrong (right). The table
has, of the first domain's held-out records, by how much the loss rose and the metric fell after the third domain
since the first, and the held-out loss of the second and third right after their own training. Each training leaves a
file in FOLDER, so that a call goes on where the one before it ended (`--minutes`); the last prints the table.

chapters   the example: a condition, its ICD-10-CM chapter; judged by exact match
orders     made here: an order in a sentence, the same as JSON; judged by exact match
notices    made here: a disturbance as data, a notice in one of four phrasings; what is replayed is judged by ROUGE-L to
           the record's own notice, as a run judges it, what is held out by that to the nearest of the four, which say
           the same
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.noise import train_missing
from components.config import config_file
from components.prepare.dataset import Record
from components.prepare.rows import example_rows
from ray_jobs.scoring.answers import rouge_l
from tests.doubles.datasets import validate

CONFIG = Path(__file__).parents[1] / "pipelines" / "configs" / "icd10.toml"
BATCH, HELD_OUT, MADE = 16, 200, 6000
SEEDS = 3
SHARES = (0.01, 0.05)
SOURCES = ("records", "production", "right")
CANDIDATES = 4
"""Earlier records that are answered for each right answer that is to be replayed alone."""
NEW_TOKENS = 48
GOODS = ("lamps", "chairs", "desks", "kettles", "shelves", "mirrors", "carpets", "curtains", "vases", "clocks")
COLOURS = ("red", "blue", "green", "black", "white", "grey", "brown", "yellow", "orange", "purple", "pink", "beige")
TOWNS = ("Leeds", "Porto", "Lyon", "Graz", "Turin", "Bergen", "Gdansk", "Bruges", "Malaga", "Tartu", "Brno", "Kiel")
NAMES = ("Ines", "Omar", "Petra", "Jonas", "Mei", "Farah", "Lukas", "Aisha", "Noor", "Piotr", "Elena", "Marta", "Ravi")
PLACES = ("Harbour", "Castle", "Mill", "Station", "Bridge", "Park", "Market", "Airport", "Hospital", "Museum", "Lake")
CAUSES = ("roadworks", "a signal failure", "a fallen tree", "flooding", "ice on the wires", "a broken rail")
Row = dict[str, Any]


@dataclass(frozen=True)
class Domain:
    rows: Callable[[], Iterator[Row]]
    metric: str
    least: float
    """Worth by that metric from which an answer is replayed."""
    right: Callable[[str], Sequence[str]] | None = None
    """All right answers to what is asked, where the record's own is not the only one."""

    def worth(self, record: Record, score: Any) -> float:
        """The metric of a held-out record's answer."""
        if self.right is None:
            return float(score.marks[self.metric])
        return max(rouge_l(score.text, each) for each in self.right(record.prompt[-1].content))


@dataclass(frozen=True)
class Arm:
    """What is replayed."""

    source: str = "none"
    """none, or one of SOURCES."""
    share: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.source}-{self.share:g}"


@dataclass(frozen=True)
class Training:
    order: Sequence[str]
    turn: int
    """0 to 2: which domain of the order is new."""
    arm: Arm
    """In turn 0 nothing is replayed."""
    seed: int
    steps: int

    @property
    def name(self) -> str:
        replayed = f"-{self.arm.name}" if self.turn else ""
        return f"{'-'.join(self.order[: self.turn + 1])}-{self.steps}-{self.seed}{replayed}"

    @property
    def before(self) -> "Training":
        return replace(self, turn=self.turn - 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replaying", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--order", nargs=3, choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--replayed", nargs="+", choices=SOURCES, default=SOURCES, help="besides none")
    parser.add_argument("--steps", type=int, default=48, help=f"optimizer steps of {BATCH} records, for each domain")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further training after so many")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    arms = [Arm(), *(Arm(source, share) for share in options.shares for source in options.replayed)]
    trainings = (
        Training(options.order, turn, arm, seed, options.steps)
        for seed in range(options.seeds)
        for arm in arms
        for turn in range(3)
    )
    if train_missing(train, trainings, options.folder, ends=ends):
        show(options.folder, options.order, arms, options.seeds, options.steps)


def _orders() -> Iterator[Row]:
    drawn = random.Random(1)
    for number in range(MADE):
        good, colour, town, name = map(drawn.choice, (GOODS, COLOURS, TOWNS, NAMES))
        count = drawn.randrange(2, 99)
        asked = (
            f"{name} from {town} would like {count} {colour} {good}.",
            f"Please send {count} {good} in {colour} to {name}, {town}.",
            f"{count} {colour} {good} for {name} in {town}, as soon as you can.",
        )
        said = {"count": count, "good": good, "colour": colour, "to": name, "town": town}
        yield _row(f"order/{number}", "Write the order as JSON.", drawn.choice(asked), json.dumps(said))


def _notices() -> Iterator[Row]:
    drawn = random.Random(2)
    for number in range(MADE):
        line, late, place = drawn.randrange(1, 99), drawn.randrange(3, 60), drawn.choice(PLACES)
        asked = f"line {line} | {late} min | {drawn.choice(CAUSES)} | {place}"
        yield _row(f"notice/{number}", "Write the notice.", asked, drawn.choice(_phrased(asked)))


def _phrased(asked: str) -> tuple[str, ...]:
    """The notices of a disturbance in all four phrasings."""
    line, late, cause, place = asked.removeprefix("line ").replace(" min", "").split(" | ")
    return (
        f"Line {line} is {late} minutes late because of {cause} at {place}.",
        f"Due to {cause} at {place}, line {line} is delayed by {late} minutes.",
        f"Expect {late} minutes of delay on line {line}: {cause} at {place}.",
        f"There is {cause} at {place}; line {line} runs {late} minutes behind schedule.",
    )


def _row(name: str, task: str, asked: str, answer: str) -> Row:
    said = {"system": task, "user": asked, "assistant": answer}
    return {"id": name, "messages": [{"role": role, "content": text} for role, text in said.items()]}


DOMAINS = {
    "chapters": Domain(example_rows, "exact_match", 1.0),
    "orders": Domain(_orders, "exact_match", 1.0),
    "notices": Domain(_notices, "rouge_l", 0.4, _phrased),
}


def train(training: Training, folder: Path) -> None:
    """Leave the weights, the held-out loss of each domain up to this one with them, and the first's metric."""
    import torch
    from safetensors.torch import load_file, save_file

    from benchmarks import our_loop
    from ray_jobs import entry
    from ray_jobs.base import base_model
    from ray_jobs.kernels import door
    from ray_jobs.scoring.generation import label_nll, score
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import plan_epoch, tokenize
    from ray_jobs.training import checkpoint

    entry.quiet_libraries()
    started = time.monotonic()
    settings = {"train.seed": training.seed, "train.max_steps": training.steps, "ray.num_workers": 1}
    config = config_file.load(CONFIG, [f"{key}={value}" for key, value in settings.items()])
    base = base_model.resolve(config.model)
    chat = chat_format.load(base, config.model)
    engine = our_loop.make(
        config, base, door.choose(config, base_model.load_config(base.path, config.model)), dense_base=True
    )

    def answered(records: Sequence[Record]) -> Any:
        return score(
            engine.module.eval(),
            chat,
            records,
            tokenize(records, chat, config.model.max_length),
            with_other_prompts=None,
            batch_size=BATCH,
            max_new_tokens=NEW_TOKENS,
            advance=lambda _: None,
        )

    if training.turn:
        checkpoint.copy_weights(load_file(folder / f"{training.before.name}.safetensors"), engine.module)
        engine.optimizer.refresh_fp32_params()
    records = _to_train_on(training.order[training.turn], training.seed, training.steps)
    replayed = _replayed(training, answered)
    records = records[: len(records) - round(training.arm.share * len(records)) if training.turn else None] + replayed
    split = tokenize(records, chat, config.model.max_length)
    batches = plan_epoch(split.lengths, batch_size=BATCH, group_by_length=True, seed=training.seed, epoch=0)
    engine.module.train()
    for _ in our_loop.steps(engine, config, split, chat.pad, batches):
        pass
    save_file(checkpoint.weights(engine.module), folder / f"{training.name}.safetensors")
    found: dict[str, Any] = {"replayed": len(replayed)}
    for name in training.order[: training.turn + 1]:
        held_out = tokenize(_held_out(name), chat, config.model.max_length)
        with torch.inference_mode():
            nll = label_nll(engine.module.eval(), held_out, BATCH, chat.pad)
        found[name] = {"loss": float(sum(nll) / held_out.num_answer_tokens.sum())}
    first = training.order[0]
    asked = _held_out(first)
    found[first]["worth"] = float(np.mean(list(map(DOMAINS[first].worth, asked, answered(asked)))))
    (folder / f"{training.name}.json").write_text(json.dumps(found))
    print(f"{training.name}: {found}, {time.monotonic() - started:.0f} s", flush=True)


def _replayed(training: Training, answered: Callable[[Sequence[Record]], Any]) -> list[Record]:
    """A random sample of the earlier domains' records, as large as the arm's share, with the arm's answers."""
    if not training.turn or training.arm.source == "none":
        return []
    earlier = [
        (name, each)
        for name in training.order[: training.turn]
        for each in _to_train_on(name, training.seed, training.steps)
    ]
    random.Random(training.seed).shuffle(earlier)
    wanted = round(training.arm.share * training.steps * BATCH)
    if training.arm.source == "records":
        return [record for _, record in earlier[:wanted]]
    asked = earlier[: wanted * (CANDIDATES if training.arm.source == "right" else 1)]
    answers = [
        replace(record, answer=each.text)
        if each.text and each.marks[DOMAINS[name].metric] >= DOMAINS[name].least
        else None
        for (name, record), each in zip(asked, answered([record for _, record in asked]), strict=True)
    ]
    if training.arm.source == "production":
        return [answer or record for (_, record), answer in zip(asked, answers, strict=True)]
    right = [answer for answer in answers if answer]
    return right[:wanted] or [record for _, record in asked[:wanted]]


def _to_train_on(name: str, seed: int, steps: int) -> list[Record]:
    return random.Random(seed).sample(_records(name)[HELD_OUT:], steps * BATCH)


def _held_out(name: str) -> list[Record]:
    return _records(name)[:HELD_OUT]


def _records(name: str) -> list[Record]:
    """In an order of their own, each prompt once."""
    rows = {row["messages"][1]["content"]: row for row in DOMAINS[name].rows()}
    found = [validate(row).record for row in rows.values()]
    random.Random(0).shuffle(found)
    return found


def show(folder: Path, order: Sequence[str], arms: Sequence[Arm], seeds: int, steps: int) -> None:
    """The table."""
    first, *later = order
    of_later = " | ".join(f"loss of {name}" for name in later)
    print(f"forgetting of {first} after {' and '.join(later)}; the mean of {seeds} seeds, and each\n")
    print(f"| replayed | records | loss rose by | {DOMAINS[first].metric} fell by | {of_later} |")
    print("|---|---|---|---|---|---|")
    for arm in arms:
        begun, second, third = (
            [_read(folder, Training(order, turn, arm, seed, steps)) for seed in range(seeds)] for turn in range(3)
        )
        pairs = list(zip(begun, third, strict=True))
        cells = [
            [after[first]["loss"] - before[first]["loss"] for before, after in pairs],
            [before[first]["worth"] - after[first]["worth"] for before, after in pairs],
            [each[later[0]]["loss"] for each in second],
            [each[later[1]]["loss"] for each in third],
        ]
        share = f" {arm.share:.0%}" if arm.share else ""
        replayed = np.mean([each["replayed"] for each in second + third])
        print(f"| {arm.source}{share} | {replayed:.0f} | {' | '.join(map(_mean_and_each, cells))} |", flush=True)


def _mean_and_each(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({', '.join(f'{each:.3f}' for each in values)})"


def _read(folder: Path, training: Training) -> Any:
    return json.loads((folder / f"{training.name}.json").read_text())


if __name__ == "__main__":
    main()
