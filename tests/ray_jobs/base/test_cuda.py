"""Which GPUs the wheels of PyTorch run on. The judges are the lists of its wheels and NVIDIA's rules."""

from types import SimpleNamespace

import pytest
import torch

from components.shared.errors import ConfigError
from ray_jobs.base import architecture
from ray_jobs.training import zero

CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 0), CUDA_12, True),  # V100
        ((7, 0), CUDA_13, False),
        ((7, 5), CUDA_13, True),  # T4
        ((8, 9), CUDA_13, True),  # L4
        ((9, 0), CUDA_13, True),  # H100
        ((10, 3), CUDA_13, True),  # B300, as sm_100
        ((12, 1), CUDA_13, True),
        ((13, 0), CUDA_13, True),  # to come, by the driver
        ((10, 0), CUDA_12, False),  # B200
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
    ],
)
def test_a_gpu_runs_what_is_built_for_it(capability, architectures, runs):
    assert architecture.has_kernels(capability, architectures) is runs


def test_a_gpu_without_kernels_is_refused_before_a_base_is_fetched_for_it(monkeypatch):
    there = SimpleNamespace(
        get_device_capability=lambda: (7, 0), get_arch_list=lambda: CUDA_13, get_device_name=lambda: "Tesla V100"
    )
    monkeypatch.setattr(torch, "cuda", there)
    message = r"Tesla V100 has compute capability 7\.0, and torch .* is built for sm_75, .*: take a newer ray\.gpu"
    with pytest.raises(ConfigError, match=message):
        zero.prepare_environment(use_gpu=True)
