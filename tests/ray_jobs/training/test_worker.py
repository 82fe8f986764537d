"""What a worker does around its steps: float16 with loss scaling, as GPUs without bfloat16 train, a base that is held
dense as the plan says, and nodes that are slow.

DeepSpeed lets a CPU train in float16 only with instructions for it; PyTorch multiplies float16 on any, slowly. That a
base is held dense only where memory allows is shown by test_float32_layers.py.
"""

import itertools
import math
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes
import numpy as np
import pytest
import torch
import torch.distributed as dist

from components.config import config_file
from ray_jobs.adapters import build
from ray_jobs.base import base_model
from ray_jobs.training import step_zero, train_loop, zero
from tests.models.plain import plain_training
from tests.models.tiny import colour_rows
from tests.models.train_group import Trained, fit_in_rank, in_group, train_in_rank
from tests.ray_jobs.training.in_store import in_store

ROWS = colour_rows(256)
NOISE = 0.03  # what gradients of 16 bits, summed in another order, may move a loss by over these steps


def train_in_float16(config_toml: str, first_scale: int) -> tuple[Trained, list[float | None]]:
    """One rank's part; and what the loss was multiplied by after each step."""
    zero.prepare_environment(use_gpu=False)
    from deepspeed.accelerator import get_accelerator

    from ray_jobs.base import architecture

    scales, take_step = [], train_loop.take_step

    def seen(engine, *arguments, **others):
        assert {p.dtype for p in engine.module.parameters() if p.is_floating_point()} == {torch.float16}
        taken = take_step(engine, *arguments, **others)
        scales.append(zero.loss_scale(engine))
        return taken

    with (
        mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True),
        mock.patch.object(architecture, "dtype_here", return_value=torch.float16),
        mock.patch.object(train_loop, "take_step", seen),
    ):
        zero.LOSS_SCALING["initial_scale_power"] = round(math.log2(first_scale))
        return train_in_rank({"half": config_toml}, ROWS)["half"], scales


def test_a_base_of_few_bits_that_was_made_for_bfloat16_is_refused(config, store, tmp_path, monkeypatch):
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "cache"))
    toml = config_file.dumps(in_store(config, store, "method.name=loftq"))
    with pytest.raises(RuntimeError, match=r"ConfigError: .* is stored in few bits for bfloat16"):
        in_group(train_in_float16, toml, 2**12, directory=tmp_path, num_workers=2)


@pytest.mark.parametrize(
    ("zero_stage", "first_scale"),
    [
        pytest.param(3, 2**12, id="fitting", marks=pytest.mark.full),
        pytest.param(0, 2**22, id="far too large", marks=pytest.mark.slow),
    ],
)
def test_a_training_in_float16_takes_the_steps_of_a_plain_loop_once_its_scale_fits(
    config, store, tmp_path, zero_stage, first_scale
):
    changes = ["method.name=qdora", "ray.cpu_matmul_dtype=bfloat16", "train.early_stopping_patience=0"]
    toml = config_file.dumps(in_store(config, store, f"train.zero_stage={zero_stage}", *changes))
    found, scales = in_group(train_in_float16, toml, first_scale, directory=tmp_path, num_workers=2)[0]
    expected = plain_training(toml, ROWS)
    # A step whose gradients overflow is left out, and the scale halved.
    skipped = round(math.log2(first_scale / scales[-1]))
    assert scales[skipped:] == [scales[-1]] * (len(scales) - skipped)
    assert (skipped > 0) is (first_scale == 2**22), scales
    np.testing.assert_allclose(found.losses[: skipped + 1], [expected.losses[0]] * (skipped + 1), atol=1.0)
    if not skipped:
        np.testing.assert_allclose(found.losses, expected.losses, atol=NOISE)
    assert found.losses[-1] < found.losses[skipped]


FEW_STEPS = 4


def train_and_save(config_toml: str, folder: Path, *, dense_base: bool) -> dict[str, Any]:
    """What this rank sees of a training, and of the adapter that it saves as it is published."""
    fitted = fit_in_rank(config_file.loads(config_toml), colour_rows(80), run_id=folder.name, dense_base=dense_base)
    build.save(fitted.adapted, folder)
    return {
        "losses": [record["loss"] for record in fitted.records],
        "recipe": fitted.recipe,
        "layer": type(fitted.adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer),
        "files": {path.name: path.read_bytes() for path in folder.iterdir()},
    }


def stored_and_dense(config_toml: str, folder: Path) -> list[dict[str, Any]]:
    """In each rank, by both ways."""
    rank = f"{torch.distributed.get_rank()}"
    ways = {"stored": False, "dense": True}
    return [train_and_save(config_toml, folder / rank / name, dense_base=is_dense) for name, is_dense in ways.items()]


def test_a_dense_base_gives_the_same_losses_and_files_to_the_bit(config, store, tmp_path):
    method = ["method.name=qdora", "method.rank=4", "ray.cpu_matmul_dtype=float32", f"train.max_steps={FEW_STEPS}"]
    toml = config_file.dumps(in_store(config, store, *method))
    stored, dense = in_group(stored_and_dense, toml, tmp_path, directory=tmp_path / "logs", num_workers=2)[0]
    assert issubclass(stored.pop("layer"), bitsandbytes.nn.Linear4bit)
    assert not issubclass(dense.pop("layer"), bitsandbytes.nn.Linear4bit)
    assert len(stored["losses"]) > FEW_STEPS
    assert stored["losses"][0] != stored["losses"][FEW_STEPS - 1]
    assert dense == stored  # the recipe too, which the lineage has


STEP_S, FETCH_S = 15.0, 20.0


def fit_with_a_slow_node(config_toml: str, meeting: str) -> int:
    """Rank 1 fetches the base, and rank 0 reads it for the first check, longer than a collective may take."""
    rank, num_workers = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # until all have met: who leaves before that ends the others' meeting
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", timeout=timedelta(seconds=STEP_S), rank=rank, world_size=num_workers
    )
    resolve, probe, calls = base_model.resolve, step_zero.probe, []

    def slowly(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if rank == 1 and len(calls) == 2:  # the first is the test's own
            time.sleep(FETCH_S)
        return resolve(*given, **more)

    def reading(*given: Any) -> Any:
        if rank == 0:
            time.sleep(FETCH_S)
        return probe(*given)

    with mock.patch.object(base_model, "resolve", slowly), mock.patch.object(step_zero, "probe", reading):
        return fit_in_rank(config_file.loads(config_toml), colour_rows(32), run_id="slow").trained.progress.step


def test_workers_wait_for_the_one_that_fetches_the_base_last(config, store, tmp_path: Path):
    toml = config_file.dumps(in_store(config, store, "train.epochs=1"))
    steps = in_group(fit_with_a_slow_node, toml, str(tmp_path / "meeting"), directory=tmp_path, num_workers=2)
    assert steps[0] == steps[1] > 0


@pytest.mark.parametrize(
    ("seconds", "rank"),
    [
        ([10.0, 12.0], None),
        ([10.0, 13.0], 1),
        ([13.0, 10.0, 10.2, 9.9], 0),
        ([10.0, 30.0, 30.0, 10.0, 10.0], 1),  # two: one of them is named
        ([10.0, 5.0, 10.0], None),  # who is fast holds up nobody
    ],
)
def test_the_straggler_is_who_is_slower_than_most(seconds, rank):
    assert train_loop.straggler(seconds) == rank


def paced(zero_stage: int) -> None:
    """In each rank: rank 1's clock runs twice as fast."""
    rank = dist.get_rank()
    ticks = itertools.count(0.0, 1.0 + rank)
    train_loop.time = SimpleNamespace(perf_counter=lambda: next(ticks))  # type: ignore[attr-defined]
    pace = train_loop.Pace(zero.Worker(rank, 2, torch.device("cpu")), zero_stage=zero_stage)
    for step in range(1, 2 * train_loop.EVERY_STEPS + 1):
        with pace.forward():
            pass
        pace.compare(step)


@pytest.mark.parametrize(("zero_stage", "times"), [(2, 1), (3, 0)])
def test_a_straggler_is_named_once_where_workers_compute_by_themselves(tmp_path: Path, zero_stage: int, times: int):
    in_group(paced, zero_stage, directory=tmp_path, num_workers=2)
    said = (tmp_path / "rank-0.log").read_text()
    assert said.count("holds up the others: its forward passes took 100.0 s and theirs 50.0 s") == times
    assert said.count("worker 1 on ") == times
