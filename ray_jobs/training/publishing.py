"""Publishing the result of a training: the adapter, its tokenizer, its model card, and its lineage."""

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from components.config.methods import AXES, OWN_BASE
from components.config.ray import price_per_hour
from components.handover.serve_manifest import recorded, serving
from components.records import runs
from components.records.steps import Usage
from components.registry import between_runs, lineage
from components.registry.versions import Version, publish_version
from components.shared.machine import this_cpu
from components.store import client
from components.store.store import Store
from ray_jobs.adapters import build, own_base
from ray_jobs.base import architecture, base_model
from ray_jobs.text import chat_format
from ray_jobs.training.checkpoint import TrainingProgress
from ray_jobs.training.metrics_log import MetricsLog
from ray_jobs.training.spec import TrainingConfig, TrainSpec
from ray_jobs.training.train_loop import TrainedAdapter
from ray_jobs.training.zero import Worker


@dataclass(frozen=True)
class Fitted:
    """A training that has ended, as each of its workers has it."""

    adapted: Any
    """The model with its final weights."""
    trained: TrainedAdapter
    recipe: Mapping[str, Any]
    """What was built, for the lineage."""
    base: base_model.Base
    """The original base, as it was read."""


def recipe_of(
    config: TrainingConfig, adapted: Any, original: base_model.Base, base: base_model.Base, worker: Worker
) -> dict[str, Any]:
    """What was built, for the lineage. Counted before training: an NF4 layer stores two weights in each byte."""
    trainable, total = adapted.get_nb_trainable_parameters()
    modules = sorted({name.rpartition(".")[2] for name in adapted.targeted_module_names})
    parameters = sorted({".".join(name.split(".")[-2:]) for name in adapted.targeted_parameter_names})
    return {
        **{axis: getattr(config.method.row, axis) for axis in AXES},
        "rank": config.method.r,
        **({"alpha": config.method.lora_alpha} if config.method.row.has_alpha else {}),
        "trainable_parameters": trainable,
        "parameters": total,
        "trainable_share": trainable / total,
        "target_modules": modules,
        **({"target_parameters": parameters} if parameters else {}),
        "serving": asdict(serving(config.method.row, rank=config.method.r, target_modules=modules + parameters)),
        "stands_on": base.reference,
        "auto_class": architecture.auto_class(adapted.config).__name__,
        "dtype": str(worker.dtype).removeprefix("torch."),
        "matmul_dtype": worker.kernels.dtype,
        "chat": chat_format.load(original, config.model).recipe(),
        **own_base.recipe(config, base),
    }


def publish(
    spec: TrainSpec, store: Store, fitted: Fitted, worker: Worker, *, started_at: datetime, usage: Usage | None = None
) -> Version:
    """Publish the trained adapter as a version; on rank 0 only."""
    trained, progress = fitted.trained, fitted.trained.progress
    record = lineage.Lineage(
        asked=spec.asked,
        run_id=spec.run_id,
        base=lineage.Base(spec.base.reference, fitted.base.identity),
        dataset=spec.dataset,
        environment=lineage.environment(
            Path(__file__).parent,
            image=os.environ.get("FINELOOP_IMAGE", ""),
            revision=os.environ.get("FINELOOP_REVISION", ""),
        ),
        hardware=lineage.Hardware(
            this_cpu().name,
            cpus_per_worker=spec.ray.cpus_per_worker,
            workers=worker.num_workers,
            gpu=torch.cuda.get_device_name(worker.device) if worker.device.type == "cuda" else "",
        ),
        started=spec.started,
        recipe=fitted.recipe,
        parents=[spec.start.uri] if spec.start else [],
        sources=read.sources if (read := runs.find(store, spec.run_id, between_runs.Consumed)) else {},
        training=lineage.Training(
            steps=progress.step,
            tokens=progress.tokens,
            train_loss=trained.last_loss,
            eval_loss=trained.eval_loss,
            wall_s=round(progress.elapsed_s, 3),
            world_size=worker.num_workers,
            started_at=started_at.isoformat(),
            resumed_from=f"step {trained.resumed_from}" if trained.resumed_from else "",
            more={
                "first_loss": trained.first_loss,
                "best_step": progress.best_step,
                "stopped_early": trained.stopped_early,
                **({"usage": usage.model_dump()} if usage else {}),
            },
        ),
    ).as_json()
    with tempfile.TemporaryDirectory(prefix="fineloop-version-") as scratch:
        folder = Path(scratch)
        build.save(fitted.adapted, folder)
        # Servers must prompt the adapter as in training: a base may have no chat template, or change its own.
        chat_format.load(fitted.base, spec.model).tokenizer.save_pretrained(folder)
        files: dict[str, bytes | Path] = {path.name: path for path in folder.iterdir()}
        files["README.md"] = model_card(spec, record).encode()
        return publish_version(store, spec.adapter.name, files, lineage=record)


def usage_of(
    spec: TrainSpec, worker: Worker, progress: TrainingProgress, metrics: MetricsLog | None, *, seconds: float
) -> Usage | None:
    """The usage of all workers, each held for this many `seconds`, on the worker that has `metrics`, None elsewhere;
    every worker must call this."""
    traffic = client.so_far()
    total = torch.tensor([traffic.requests, traffic.read_bytes, traffic.written_bytes], device=worker.device)
    dist.all_reduce(total)
    if metrics is None:
        return None
    requests, read_bytes, written_bytes = total.tolist()
    gpu = torch.cuda.get_device_name(worker.device) if worker.device.type == "cuda" else ""
    held_s = worker.num_workers * seconds
    flops = progress.tokens * spec.flops_per_token if spec.flops_per_token else None
    price, source = price_per_hour(spec.ray, gpu) or (None, "")
    return Usage(
        workers=worker.num_workers,
        gpu=gpu,
        held_s=round(held_s, 3),
        in_steps_s=round(worker.num_workers * progress.elapsed_s, 3),
        tokens=progress.tokens,
        restarts=metrics.restarts,
        steps_repeated=metrics.steps_repeated,
        flops=flops,
        flops_with_parents=None if flops is None or spec.flops_before is None else flops + spec.flops_before,
        s3_requests=requests,
        s3_read_bytes=read_bytes,
        s3_written_bytes=written_bytes,
        price=None if price is None else price * held_s / 3600,
        price_source=source,
    )


# The README.md of a published version: a model card, with the front matter that model hubs read.

HOW_SERVED = {
    "lora": "Servers of LoRA adapters load it as it is.",
    "lora-export": "Servers of LoRA adapters load what `fineloop adapters export --lora` makes of it.",
    "merged": "It is served merged into its base, by `fineloop adapters export --merged`.",
}
MEASURED = {
    "merge": "merged, against the adapter on the same weights, in float32",
    "saved": "this folder, against the adapter in float32 on the weights it was trained on",
    "rounded": "these weights, against the merge before it was rounded, both run in float32",
    "effect": "for comparison: the base without the adapter, against the adapter on it, in float32",
    "evaluated": "this folder, against the adapter as it was evaluated",
    "converted": "this adapter, against the one it was made from, in float32",
}


def model_card(config: TrainSpec, lineage: Mapping[str, Any]) -> str:
    """The model card: what the adapter is, its base, how it was trained and how to load it. Markdown."""
    training, dataset, recipe, served = lineage["training"], lineage["dataset"], lineage["recipe"], recorded(lineage)
    identity = ", ".join(f"{key} `{value}`" for key, value in lineage["base"]["identity"].items())
    eval_loss = training["eval_loss"]
    auto_class = recipe.get("auto_class", "AutoModelForCausalLM")
    trained = f"{recipe['trainable_parameters']:,} of {recipe['parameters']:,} ({recipe['trainable_share']:.2%})"
    pace = f"{training['wall_s']:.0f} s on {training['world_size']} workers"
    notes = "".join(f"\n- {note[:1].upper()}{note[1:]}." for note in served.notes)
    own_base = (
        ""
        if config.method.row.init not in OWN_BASE
        else f"\n| Stands on | `{recipe['stands_on']}`: weights that were chosen together with the adapter's start. "
        "It is wrong on any other base; `fineloop adapters pull --with-base` fetches both |"
    )
    return f"""---
library_name: peft
base_model: {config.model.base}
tags: [{recipe["adapter"]}, fineloop]
---

# {config.adapter.name}

A {config.method.name} adapter (rank {config.method.r}) for `{config.model.base}`, trained by Fineloop run
`{lineage["run_id"]}`. `lineage.json` beside this file holds the whole record, `manifest.json` the sha256 of every file.

| | |
|---|---|
| Base | `{config.model.base}` ({identity}), loaded as {recipe["base"]} |{own_base}{_chat(recipe)}
| Data | `{dataset["dataset_id"]}`: {dataset["train_records"]} records trained on, {dataset["eval_records"]} held out |
| Trained parameters | {trained} |
| Training | {training["steps"]} steps, {training["tokens"]:,} tokens, {pace} |
| Held-out loss | {f"{eval_loss:.4f} nats per answer token" if eval_loss is not None else "not measured"} |

```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained(BASE_FOLDER)  # {recipe.get("stands_on", config.model.base)}
model = PeftModel.from_pretrained(base, ADAPTER_FOLDER)
```

`fineloop adapters pull {config.adapter.name} --to ADAPTER_FOLDER --with-base` writes both, the base to
`ADAPTER_FOLDER-base`.

## Serving

{HOW_SERVED[served.servable_as]}{notes and chr(10) + notes}
"""


def _chat(recipe: Mapping[str, Any]) -> str:
    if "chat" not in recipe:
        return ""
    whose = "the base's own" if recipe["chat"]["template_from"] == "base" else "Fineloop's, as the base has none"
    switches = [f"`{name}={str(value).lower()}`" for name, value in recipe["chat"].get("template_kwargs", {}).items()]
    how = f", to be asked with {' and '.join(switches)} (`chat_template_kwargs`)" if switches else ""
    stops = ", ".join(f"`{stop}`" for stop in recipe["chat"]["stops"])
    return f"\n| Chat template | {whose}, beside this file with the tokenizer{how}. Answers end with {stops} |"


def export_card(method: str, record: Mapping[str, Any]) -> str:
    """The README.md of an exported folder: what it is, its source, and how far the two differ. Markdown."""
    base, parity, form = record["base_model"], record["parity"], record["form"]
    if form == "lora":
        which = "The adapter" if record["exact"] else "The nearest LoRA to the adapter, not the adapter itself,"
        what = f"{which} as plain LoRA of rank {record['rank']}, for the base `{base['stands_on']}`."
    else:
        read_by = {
            "merged": "a transformers model that needs no peft",
            "gguf": "a file for llama.cpp; Ollama takes it with `ollama create NAME -f Modelfile` in this folder",
        }[form]
        what = (
            f"`{base['reference']}` with the adapter merged into its {record['base']} weights, saved as "
            f"{record['dtype']}: {read_by}."
        )
    library = {"merged": "transformers", "gguf": "gguf", "lora": "peft"}[form]
    figures = "".join(
        f"| {MEASURED[name]} | {agreement['argmax_agreement']:.2%} | {agreement['max_abs_logit_difference']:.3g} "
        f"| {agreement['mean_kl_nats']:.3g} |\n"
        for name, agreement in parity.items()
        if name in MEASURED
    )
    return f"""---
library_name: {library}
base_model: {base["reference"]}
tags: [{form}, fineloop]
---

# {record["adapter"]}

{what} Made from version `{record["version"]}` ({method}, base trained on as {base["format"]}), manifest sha256 \
`{record["manifest_sha256"]}`; `export.json` holds the record.

Compared on {parity["compared_on"]}:

| | same token | largest logit difference | mean KL, nats |
|---|---|---|---|
{figures}"""


def base_card(record: Mapping[str, Any]) -> str:
    """The README.md of a base written for servers: where it came from, its licence, how both are served. Markdown."""
    base, name, version = record["base_model"], record["adapter"], record["version"]
    identity = ", ".join(f"{key} `{value}`" for key, value in base["identity"].items())
    front = f"license: {base['license']}\n" if re.fullmatch(r"[\w.+-]+", base["license"]) else ""
    return f"""---
library_name: transformers
{front}tags: [fineloop]
---

# The base of {name}

`{base["reference"]}` ({identity}) as a transformers folder: its weights as Fineloop reads them, before any quantising.
Licence: {base["license"] or "not stated"}. Tokenizer, chat template and the tokens that end an answer are those that
`{name}@{version}` was trained with. `fineloop adapters serve-manifest {name}@{version} --for vllm` serves both.
"""
