"""Whether evaluate.engine = "vllm" answers as the engine of training: `make served`, or `python -m benchmarks.engines`.

For each method, an adapter of a few steps on the packaged base and the built-in example's data, evaluated twice in the
way of a worker, in this process: with vLLM, and without. An answer that differs is a near tie where the two tokens at
which the answers part lie less than a quarter of a nat apart for the engine of training; any other makes the command
fail.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import example
from benchmarks.gpu_day import BUCKET, a_store
from benchmarks.served import NEAR_TIE
from benchmarks.vllm_server import ON_PROCESSORS
from components.config import config_file
from components.config.schema import RunConfig
from components.prepare.dataset import Record
from components.records import runs
from components.records.steps import Evaluation, Role
from components.registry.versions import Version, pull_version
from components.store.store import Store

SETTINGS = (
    f"registry.bucket={BUCKET}",
    "evaluate.max_records=0",
    "evaluate.general_passages=0",
    "ray.cpus_per_worker=2",
    "ray.cpu_matmul_dtype=bfloat16",
)
BATCH = 8
RATE = 1e-3


def main() -> None:
    parser = example.parser("engines", __doc__)
    parser.add_argument("--vllm", type=Path, default=Path(".venv-served"), help="a virtual environment with vLLM")
    parser.add_argument("--methods", nargs="+", default=["lora", "rslora"])
    parser.add_argument("--records", type=int, default=50)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    began, rows = time.monotonic(), []
    os.environ |= {**ON_PROCESSORS, "FINELOOP_VLLM_PYTHON": str(options.vllm.absolute() / "bin" / "python")}
    with tempfile.TemporaryDirectory(prefix="fineloop-engines-") as scratch, a_store(Path(scratch)):
        for method in options.methods:
            settings = [f"adapter.name={method}", f"method.name={method}", f"evaluate.records={options.records}"]
            rows += compared([*SETTINGS, *settings], Path(scratch) / method, options.records, options.steps)
    columns = f"{'answers':>8}{'right':>7}{'equal':>7}{'near ties':>11}{'apart':>7}{'reported':>12}"
    print(f"\n{'method':<8}{'model':<11}{columns}", *rows, f"{time.monotonic() - began:.0f} s in all", sep="\n")
    sys.exit(any(max(row.margins, default=0.0) > NEAR_TIE for row in rows))


@dataclass
class Row:
    """One model's answers by both engines, and how many differ by the evaluation itself, over its models."""

    method: str
    role: Role
    texts: dict[str, tuple[str, str]]
    right: float
    reported: str
    margins: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        count, ties = len(self.texts), sum(margin <= NEAR_TIE for margin in self.margins)
        counts = f"{count:>8}{self.right * count:>7.0f}{count - len(self.margins):>7}{ties:>11}"
        return f"{self.method:<8}{self.role:<11}{counts}{len(self.margins) - ties:>7}{self.reported:>11}"


def compared(settings: Sequence[str], scratch: Path, count: int, steps: int) -> list[Row]:
    """A row for the base, and one for the candidate."""
    from ray_jobs.kernels import float32_layers
    from tests.doubles import datasets
    from tests.models.tiny_version import publish

    config, _, chat, records, kernels = example.parts(2, *settings)
    store, name = Store.open(config.registry), config.method.name
    trained_on, held_out = records[: steps * BATCH], records[-2 * count :]  # some of them are for validation
    dataset = datasets.publish(store, train=trained_on, evaluation=held_out).uri

    def change(adapted: Any) -> None:
        float32_layers.widen(kernels.adopt(adapted), kernels.dtype)
        learn(adapted, chat, trained_on, steps)

    began = time.monotonic()
    version = publish(config, store, scratch, data_uri=dataset, change=change)
    print(f"{name}: {steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    by = {engine: evaluated(config, engine, dataset, version.uri) for engine in ("transformers", "vllm")}
    told, rows = by["vllm"].generation, []
    for role in ("base", "candidate"):
        own, its = (answers(store, by[engine], role) for engine in ("transformers", "vllm"))
        texts = {key: (own[key], its[key]) for key in own}
        right = by["vllm"].metric(role, "exact_match") or 0.0
        row = Row(name, role, texts, right, f"{told['differing']} of {told['compared']}")
        if differing := [record for record in held_out if record.id in texts and len({*texts[record.id]}) > 1]:
            row.margins = margins(config, store, version if role == "candidate" else None, differing, texts, scratch)
        rows.append(row)
    return rows


def learn(adapted: Any, chat: Any, records: Sequence[Record], steps: int) -> None:
    import torch

    from ray_jobs.text.batching import tokenize

    rows = example.rows(tokenize(records, chat, 128))
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    for step in range(steps):
        batch = rows[step * BATCH : (step + 1) * BATCH]
        width = max(len(row["input_ids"]) for row in batch)
        inputs, labels = (
            torch.tensor([row[key] + [pad] * (width - len(row[key])) for row in batch])
            for key, pad in (("input_ids", chat.pad), ("labels", -100))
        )
        adapted(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def evaluated(config: RunConfig, engine: str, dataset_uri: str, version_uri: str) -> Evaluation:
    """The evaluation of a version, by the job's own code but for Ray: its worker is this process."""
    import torch

    from ray_jobs import evaluate
    from ray_jobs.scoring.measure import BaseCache
    from ray_jobs.training.measuring import _measured_in_turn
    from ray_jobs.training.zero import Worker

    def measured(task: Any, store: Store, *, run_id: str) -> Any:
        return _measured_in_turn(task, BaseCache(), Worker(0, 1, torch.device("cpu")), None)

    config = config_file.loads(config_file.dumps(config), [f"evaluate.engine={engine}"])
    began, run_id = time.monotonic(), f"{config.method.name}-{engine}"
    replacements = {"measured": measured, "on_the_cluster": lambda config, _: config, "is_shared": lambda *_: False}
    with mock.patch.multiple(evaluate, **replacements), mock.patch("ray.nodes", list):
        found = evaluate.run(config, run_id=run_id, dataset_uri=dataset_uri, version_uri=version_uri)
    losses = [f"{role} {model.metrics['loss']:.4f}" for role, model in found.models.items() if model]
    print(f"{run_id}: {time.monotonic() - began:.0f} s, losses {', '.join(losses)}, {found.generation}", flush=True)
    return found


def answers(store: Store, evaluation: Evaluation, role: Role) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    body = store.get(runs.key_of(store, evaluation.run_id, runs.EVALUATION_RECORDS))
    table = pq.read_table(pa.BufferReader(body))
    return dict(zip(table["id"].to_pylist(), table[f"{role}_answer"].to_pylist(), strict=True))


def margins(
    config: RunConfig,
    store: Store,
    version: Version | None,
    records: list[Record],
    texts: dict[str, tuple[str, str]],
    folder: Path,
) -> list[float]:
    """By how many nats the engine of training prefers its own token where two answers part."""
    import torch

    from ray_jobs.adapters import build
    from ray_jobs.base import base_model
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import tokenize

    base = base_model.resolve(config.model)
    model: Any = base_model.load_model(base, config.model, config.method.row.base, use_gpu=False)
    if version:
        pull_version(store, version, folder := folder / "pulled")
        model = build.load(model, folder)
    chat = chat_format.load(base, config.model)
    split, result = tokenize(records, chat, config.model.max_length), []
    for index, record in enumerate(records):
        own, other = (
            [*chat.tokenizer(text, add_special_tokens=False)["input_ids"], min(chat.stops)] for text in texts[record.id]
        )
        place = next(place for place, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1])
        inputs = torch.tensor([[*split.prompt(index).tolist(), *own[:place]]])
        with torch.inference_mode():
            likelihoods = model.eval()(input_ids=inputs).logits[0, -1].float().log_softmax(-1)
        result.append(float(likelihoods[own[place]] - likelihoods[other[place]]))
        print(f"{record.id}: {texts[record.id]}, {result[-1]:.3f} nats", flush=True)
    return result


if __name__ == "__main__":
    main()
