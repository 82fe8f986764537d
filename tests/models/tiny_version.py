"""A published version of the tiny base, without a training: its update is drawn at random, and large."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.schema import RunConfig
from components.handover.serve_manifest import serving
from components.prepare.dataset import Message, Record
from components.records import runs
from components.records.steps import Evaluation, Measured
from components.registry.lineage import Asked, Base, Dataset, Environment, Hardware, Lineage, Training
from components.registry.versions import Version, publish_version
from components.store.store import Store
from tests.doubles import datasets
from tests.models.tiny import colour_rows

if TYPE_CHECKING:
    from ray_jobs.scoring.measure import Contender

RECORDS = [Record(row["id"], [Message("user", row["prompt"])], row["completion"]) for row in colour_rows(60)]


def randomise(adapted, *, seed: int = 0, std: float = 0.1) -> None:
    """An update that does something, as after training."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.empty_like(weight).normal_(std=std, generator=generator))


def publish(
    config: RunConfig,
    store: Store,
    scratch: Path,
    *,
    std: float = 0.1,
    with_data: bool = True,
    data_uri: str = "s3://nowhere/datasets/d0",
    change: Callable[[Any], None] | None = None,
) -> Version:
    """Publish one, as the finetune job publishes it, with held-out records of its own, or of `data_uri`. `change` gives
    the adapter other weights than random ones."""
    from ray_jobs.adapters import build, own_base
    from ray_jobs.base import base_model

    original = base_model.resolve(config.model)
    base = own_base.prepare(config, original, store)
    model = base_model.load_model(base, config.model, config.method.row.base, use_gpu=False)
    adapted = build.attach(model, config.method, base_reference=base.reference, seed=0)
    own_base.begin(config, adapted, base)
    (change or partial(randomise, std=std))(adapted)
    folder = scratch / f"adapter-{config.method.name}"
    build.save(adapted, folder)
    if with_data and data_uri == "s3://nowhere/datasets/d0":
        data_uri = datasets.publish(store, train=RECORDS[:4], evaluation=RECORDS[4:]).uri
    row, served = config.method.row, dict[str, Any]()
    if change:  # a trained one may be served, and says how
        modules = [name.rpartition(".")[2] for name in adapted.targeted_module_names]
        served = {"serving": asdict(serving(row, rank=config.method.r, target_modules=modules))}
    lineage = Lineage(
        Asked.of(config),
        run_id="",
        base=Base(config.model.base, original.identity),
        dataset=Dataset("d0", data_uri, "0" * 64, 4, len(RECORDS) - 4),
        environment=Environment("3.11", "Linux", {}),
        hardware=Hardware("Xeon", cpus_per_worker=1, workers=1),
        recipe={"adapter": row.adapter, "base": row.base, **served, **own_base.recipe(config, base)},
        training=Training(1, 1, 1.0, 1.0, 1.0, 1),
    ).as_json()
    return publish_version(store, config.adapter.name, {path.name: path for path in folder.iterdir()}, lineage=lineage)


def remember(store: Store, config: RunConfig, version: Version, **found: Any) -> None:
    """Keep an evaluation as of the run that made the version, with what its probes `found`."""
    from ray_jobs.base import base_model

    measured = Evaluation(
        run_id=version.run_id,
        records=1,
        base={"identity": base_model.resolve(config.model).identity},
        models={"candidate": Measured(version=version.version, metrics={})},
        **found,
    )
    runs.write(store, version.run_id, measured)


def contenders(config: RunConfig, *versions: Version) -> "list[Contender]":
    """The base, and the versions in their roles: the last is the candidate, one before it the champion."""
    from ray_jobs.base import base_model
    from ray_jobs.scoring.measure import Contender

    identity = base_model.resolve(config.model).identity
    roles = ["base", *["champion", "candidate"][-len(versions) :]]
    return [Contender(role, config, each, identity) for role, each in zip(roles, [None, *versions], strict=True)]


def on_its_base(config: RunConfig, store: Store, folder: Path, *, load: Callable[..., Any] | None = None):
    """The adapter at `folder` on the dequantised weights that it was trained on, in float32; `load` may be peft's."""
    from ray_jobs.adapters import build, merge, own_base
    from ray_jobs.base import base_model

    original = base_model.resolve(config.model)
    dense = base_model.load_model(original, config.model, "bf16", use_gpu=False).float()
    stands_on = own_base.find(config, original, store, sha256="")
    merge.dequantise_into(dense, base_model.load_model(stands_on, config.model, config.method.row.base, use_gpu=False))
    return (load or build.load)(dense, folder)
