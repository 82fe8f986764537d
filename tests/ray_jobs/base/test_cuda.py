"""A GPU that the installed PyTorch has no kernels for."""

from types import SimpleNamespace

import pytest
import torch

from components.shared.errors import ConfigError
from ray_jobs.training import zero


def test_a_gpu_without_kernels_is_refused_before_a_base_is_fetched_for_it(monkeypatch):
    def ones(*_, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(get_device_name=lambda: "Tesla V100"))
    with pytest.raises(ConfigError, match=r"does not run on Tesla V100 .*no kernel image.*: take a newer ray\.gpu"):
        zero.prepare_environment(use_gpu=True)
