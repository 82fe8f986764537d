"""float16 with loss scaling, as GPUs without bfloat16 train: DeepSpeed's own, here on CPU processes.

DeepSpeed lets a CPU do so only with instructions for it; PyTorch multiplies float16 on any, slowly.
"""

import math
from unittest import mock

import numpy as np
import pytest
import torch

from components.config import config_file
from components.config.schema import RunConfig
from ray_jobs.training import zero
from tests.models.plain import plain_training
from tests.models.tiny import colour_rows
from tests.models.train_group import Trained, in_group, train_in_rank
from tests.ray_jobs.training.in_store import in_store

ROWS = colour_rows(256)
NOISE = 0.03  # what gradients of 16 bits, summed in another order, may move a loss by over these steps


def test_deepspeed_scales_the_loss_dynamically_and_only_in_float16(config: RunConfig):
    half, wide = zero.settings(config, torch.float16), zero.settings(config, torch.bfloat16)
    assert half["fp16"]["enabled"]
    assert half["fp16"]["loss_scale"] == 0  # which DeepSpeed's documentation calls dynamic
    assert "bf16" not in half
    assert "fp16" not in wide
    assert wide["bf16"]["enabled"]


def train_in_float16(config_toml: str, first_scale: int) -> tuple[Trained, list[float | None]]:
    """One rank's part; and what the loss was multiplied by after each step."""
    zero.prepare_environment(use_gpu=False)
    from deepspeed.accelerator import get_accelerator

    from ray_jobs.base import architecture
    from ray_jobs.training import train_loop

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
        pytest.param(0, 2**12, id="0-fitting", marks=pytest.mark.full),
        pytest.param(3, 2**12, id="3-fitting", marks=pytest.mark.full),
        pytest.param(0, 2**22, id="0-far too large", marks=pytest.mark.slow),
        pytest.param(3, 2**22, id="3-far too large", marks=pytest.mark.full),
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
