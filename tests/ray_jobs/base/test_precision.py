"""Which GPUs know bfloat16: CUDA C++ Programming Guide, arithmetic instructions by compute capability, from 8.0 on."""

import pytest
import torch

from ray_jobs.base.architecture import dtype_on

V100, T4, A100, RTX4090, H100 = (7, 0), (7, 5), (8, 0), (8, 9), (9, 0)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (None, torch.bfloat16),
        (V100, torch.float16),
        (T4, torch.float16),
        (A100, torch.bfloat16),
        (RTX4090, torch.bfloat16),
        (H100, torch.bfloat16),
    ],
)
def test_a_gpu_that_does_not_know_bfloat16_trains_in_float16(capability, expected):
    assert dtype_on("auto", capability) is expected
    assert dtype_on("bfloat16", capability) is torch.bfloat16
    assert dtype_on("float16", capability) is torch.float16
