"""Publishing the result of a training: the adapter, its tokenizer, its model card, and its lineage."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from components.config.schema import RunConfig
from components.handover.serve_manifest import serving
from components.records.steps import Usage
from components.registry import between_runs, lineage
from components.registry.versions import Version, publish_version
from components.store.store import Store
from ray_jobs.adapters import build, own_base
from ray_jobs.base import architecture, base_model
from ray_jobs.text import chat_format
from ray_jobs.training.group import Worker
from ray_jobs.training.model_card import model_card
from ray_jobs.training.train_job import TrainJob
from ray_jobs.training.train_loop import TrainedAdapter


def recipe_of(
    config: RunConfig, adapted: Any, original: base_model.Base, base: base_model.Base, worker: Worker
) -> dict[str, Any]:
    """What was built, for the lineage. Counted before training: an NF4 layer stores two weights in each byte."""
    trainable, total = adapted.get_nb_trainable_parameters()
    modules = sorted({name.rpartition(".")[2] for name in adapted.targeted_module_names})
    parameters = sorted({".".join(name.split(".")[-2:]) for name in adapted.targeted_parameter_names})
    return {
        **{axis: getattr(config.method.row, axis) for axis in ("adapter", "scaling", "init", "base")},
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
    job: TrainJob,
    config: RunConfig,
    store: Store,
    adapted: Any,
    trained: TrainedAdapter,
    recipe: Mapping[str, Any],
    worker: Worker,
    started_at: datetime,
    usage: Usage | None = None,
) -> Version:
    """Publish the trained adapter as a version, which is not visible before it is complete; on rank 0 only."""
    progress = trained.progress
    base = base_model.resolve(config.model, recorded=job.base.identity, weights=False, registry=store)
    record = lineage.build_lineage(
        config,
        run_id=job.run_id,
        base=lineage.Base(job.base.reference, base.identity),
        dataset=job.dataset,
        environment=lineage.environment(
            Path(__file__).parent,
            image=os.environ.get("FINELOOP_IMAGE", ""),
            revision=os.environ.get("FINELOOP_REVISION", ""),
        ),
        hardware=lineage.Hardware(
            lineage.cpu_model(),
            cpus_per_worker=config.ray.cpus_per_worker,
            workers=worker.num_workers,
            gpu=torch.cuda.get_device_name(worker.device) if worker.device.type == "cuda" else "",
        ),
        started=job.started,
        recipe=recipe,
        parents=[job.start.uri] if job.start else [],
        sources=read.sources if (read := between_runs.consumed_by(store, job.run_id)) else {},
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
    )
    with tempfile.TemporaryDirectory(prefix="fineloop-version-") as scratch:
        folder = Path(scratch)
        build.save(adapted, folder)
        # Servers must prompt the adapter as in training: a base may have no chat template, or change its own.
        chat_format.load(base, config.model).tokenizer.save_pretrained(folder)
        files: dict[str, bytes | Path] = {path.name: path for path in folder.iterdir()}
        files["README.md"] = model_card(config, record).encode()
        return publish_version(store, config.adapter.name, files, lineage=record)
