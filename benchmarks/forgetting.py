"""What a training forgets, by rate and domain: `python -m benchmarks.forgetting`.

Each cell trains the example's base as `fineloop init` does (LoRA, three epochs, every other key at its default) on 600
records of a domain, and reads 100 held-out records and the passages of general text before and after it. The last
column is what the gate compares with gate.worse_on_general_text_by: the rise that the passages do not rule out. A cell
takes one to three minutes on one core; cells that FILE holds are not measured again.
"""

import argparse
import gzip
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import example
from benchmarks.gate import docstrings
from components.config import config_file
from components.config.gate import GateConfig
from components.prepare.icd10 import rows as example_rows
from pipelines.commands.init import EXAMPLE_BASE

TRAINED, HELD_OUT = 600, 100
RATES = (2e-4, 5e-4, 1e-3, 2e-3)
Row = dict[str, Any]


def main() -> None:
    parser = example.parser("forgetting", __doc__)
    parser.add_argument("--file", type=Path, default=Path(".fineloop/forgetting.jsonl"), help="one line a cell")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=[*DOMAINS])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cell", action="store_true", help="measure the one domain and rate here; print it as JSON")
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(_measure(options)))
        return
    options.file.parent.mkdir(parents=True, exist_ok=True)
    cells = [json.loads(line) for line in options.file.read_text().splitlines()] if options.file.exists() else []
    for rate in options.rates:
        for domain in options.domains:
            if not any((cell["domain"], cell["rate"]) == (domain, rate) for cell in cells):
                chosen = ["--cell", "--domains", domain, "--rates", str(rate)]
                cells.append(example.in_process("forgetting", chosen, threads=options.threads))
                with options.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(cells[-1]) + "\n")
                print(json.dumps(cells[-1]), flush=True)
    print("| domain | rate | steps | held-out loss | general text | rises by | by less than (95 %) |")
    print("|---|---|---|---|---|---|---|")
    for cell in sorted(cells, key=lambda cell: (cell["domain"], cell["rate"])):
        held_out, general = (" to ".join(f"{loss:.3f}" for loss in cell[key]) for key in ("held_out", "general"))
        figures = f"{cell['steps']} | {held_out} | {general} | {cell['rise']:.3f} | {cell['at_most']:.3f}"
        print(f"| {cell['domain']} | {cell['rate']:g} | {figures} |")


def _measure(options: argparse.Namespace) -> Row:
    import torch

    from benchmarks import our_loop
    from components.shared.paired import Pairs, bounds
    from ray_jobs import entry
    from ray_jobs.base import base_model
    from ray_jobs.kernels import door
    from ray_jobs.probes.texts import unread_passages
    from ray_jobs.scoring.generation import label_nll
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import plan_epoch, tokenize
    from tests.doubles.datasets import validate

    (domain,), (rate,) = options.domains, options.rates
    entry.quiet_libraries()
    torch.set_num_threads(options.threads)
    tables = {
        "adapter": {"name": "forgetting"},
        "model": {"base": EXAMPLE_BASE, "max_length": 256},
        "data": {"source": "example://icd10"},
        "method": {"name": "lora"},
        "train": {"epochs": 3, "learning_rate": rate},
    }
    config = config_file.validate(tables)
    base = base_model.resolve(config.model)
    chat = chat_format.load(base, config.model)
    # In the order of their keys' hashes, as the prepare step takes `data.max_records` of many.
    keyed = sorted((validate(row) for row in DOMAINS[domain]()), key=lambda each: each.key)
    records = [each.record for each in islice(keyed, TRAINED + HELD_OUT)]
    train, held_out = (tokenize(part, chat, 256) for part in (records[HELD_OUT:], records[:HELD_OUT]))
    passages = unread_passages(chat, config).split
    kernels = door.choose(config, base_model.load_config(base.path, config.model))
    engine = our_loop.make(config, base, kernels, dense_base=False)

    def losses() -> tuple[float, Any]:
        engine.module.eval()
        on_held_out = sum(label_nll(engine.module, held_out, 32, chat.pad)) / int(held_out.num_answer_tokens.sum())
        on_passages = np.array(label_nll(engine.module, passages, 32, chat.pad))
        engine.module.train()
        return on_held_out, on_passages

    held_before, before = losses()  # an adapter that has not been trained changes nothing
    plan = [
        batch
        for epoch in range(config.train.epochs)
        for batch in plan_epoch(train.lengths, batch_size=config.train.batch_size, seed=config.train.seed, epoch=epoch)
    ]
    for _ in our_loop.steps(engine, config, train, chat.pad, plan):
        pass
    held_after, after = losses()
    tokens = np.asarray(passages.num_answer_tokens, dtype=float)
    between = bounds(Pairs(after, before, tokens, lower_is_better=True), GateConfig().confidence)
    assert between is not None  # the passages are the same
    return {
        "domain": domain,
        "rate": rate,
        "steps": len(plan),
        "held_out": [held_before, held_after],
        "general": [float(each.sum() / tokens.sum()) for each in (before, after)],
        "rise": -between.gain,
        "at_most": -between.lower,
    }


def _operations() -> Iterator[tuple[str, str, str]]:
    """Service, operation and first sentence of what botocore's models say of the operations of the cloud's services."""
    import botocore

    for path in sorted((Path(botocore.__file__).parent / "data").glob("*/*/service-2.json.gz")):
        model = json.loads(gzip.decompress(path.read_bytes()))
        for name, operation in model["operations"].items():
            text = " ".join(re.sub("<[^>]+>", " ", operation.get("documentation", "")).split())
            if len(text) >= 40:
                yield model["metadata"]["serviceId"], name, text.partition(". ")[0][:100]


def services() -> Iterator[Row]:
    """Short answers: which of the thirty services with the most operations does what is described."""
    operations = [*_operations()]
    counts: dict[str, int] = {}
    for service, _, _ in operations:
        counts[service] = counts.get(service, 0) + 1
    largest = {*sorted(counts, key=lambda service: -counts[service])[:30]}
    for service, name, text in operations:
        if service in largest:
            yield {"id": f"{service}/{name}", "prompt": f"Which service? {text}", "completion": service}


def descriptions() -> Iterator[Row]:
    """Sentences: what an operation of a service does, from its name."""
    for service, name, text in _operations():
        yield {"id": f"{service}/{name}", "prompt": f"{service}: {name}", "completion": text}


def short_docstrings() -> Iterator[Row]:
    """Paragraphs: the docstrings of Python and torch, whose first 150 characters are asked for."""
    for row in docstrings():
        messages = [*row["messages"][:1], {"role": "assistant", "content": row["messages"][1]["content"][:150]}]
        yield {"id": row["id"], "messages": messages}


DOMAINS: dict[str, Callable[[], Iterator[Row]]] = {
    "icd10": example_rows,
    "services": services,
    "descriptions": descriptions,
    "docstrings": short_docstrings,
}


if __name__ == "__main__":
    main()
