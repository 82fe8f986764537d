"""A training whose workers hold the base dense, where memory allows, against the same one on its few bits."""

from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes
import pytest
import torch

from components.config import config_file
from components.config.schema import RunConfig
from ray_jobs.adapters import build
from ray_jobs.kernels import float32_layers
from tests.models.tiny import colour_rows
from tests.models.train_group import fit_in_rank, in_group, in_turn

QUANTISED = bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt
STEPS = 4


def train_and_save(config_toml: str, folder: str, dense_base: bool, free_bytes: int | None) -> dict[str, Any]:
    """Train with what the plan says and with so much free memory, and save the adapter as it is published."""
    config = config_file.loads(config_toml)
    free = float32_layers.available_bytes() if free_bytes is None else free_bytes
    with mock.patch.object(float32_layers, "available_bytes", return_value=free):
        fitted = fit_in_rank(config, colour_rows(80), run_id=Path(folder).name, dense_base=dense_base)
    if fitted.worker.rank == 0:
        build.save(fitted.adapted, Path(folder))
    return {
        "losses": [record["loss"] for record in fitted.records],
        "recipe": fitted.recipe,
        "is_quantised": any(isinstance(module, QUANTISED) for module in fitted.adapted.modules()),
        "dtype": next(module.weight.dtype for name, module in fitted.adapted.named_modules() if is_base(name)),
    }


def is_base(name: str) -> bool:
    return name.endswith("q_proj.base_layer")


@pytest.fixture
def trained(config: RunConfig, store, tmp_path):
    """Two workers' trainings, one after the other, each as the plan would have the base held: what rank 0 has, and the
    files of the adapter."""

    def run(*overrides: str, dense: tuple[bool, ...], free_bytes: int | None = None) -> list[dict[str, Any]]:
        steps, calls = [f"train.max_steps={STEPS}", "method.rank=4"], []
        for is_dense in dense:
            folder = tmp_path / ("dense" if is_dense else "stored")
            place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}/{folder.name}"]
            toml = config_file.dumps(config_file.loads(config_file.dumps(config), [*place, *steps, *overrides]))
            calls.append((toml, str(folder), is_dense, free_bytes))
        found = in_group(in_turn, train_and_save, calls, directory=tmp_path / "logs", num_workers=2)[0]
        return [
            {**each, "files": {path.name: path.read_bytes() for path in Path(folder).iterdir()}}
            for each, (_, folder, *_) in zip(found, calls, strict=True)
        ]

    return run


@pytest.mark.parametrize(
    ("adapter", "base", "dtype"),
    [
        ("lora", "int8", "float32"),
        ("dora", "nf4", "float32"),
        pytest.param("dora", "nf4", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_losses_and_what_is_published_are_the_same_to_the_bit(trained, adapter, base, dtype):
    method = [f"method.adapter={adapter}", f"method.base={base}", f"ray.cpu_matmul_dtype={dtype}"]
    stored, dense = trained(*method, dense=(False, True))
    assert (stored.pop("is_quantised"), dense.pop("is_quantised")) == (True, False)
    del stored["dtype"]  # of what bits are packed in
    assert dense.pop("dtype") == getattr(torch, dtype)
    assert len(stored["losses"]) > STEPS
    assert stored["losses"][0] != stored["losses"][STEPS - 1]
    assert dense == stored  # the recipe too, which the lineage has


@pytest.mark.slow
def test_a_worker_whose_memory_is_taken_by_others_reads_the_base_as_it_is_stored(trained):
    assert trained("method.base=nf4", dense=(True,), free_bytes=1000)[0]["is_quantised"]
