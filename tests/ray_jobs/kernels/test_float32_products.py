"""Products by oneDNN against numpy in float64, and what is left of the setting."""

import numpy as np
import pytest
import torch

from components.shared.machine import Cpu
from ray_jobs.kernels import float32_layers

settings = torch.backends.mkldnn.matmul


@pytest.mark.parametrize(
    ("batch", "rows", "inner", "columns"), [(48, 60, 64, 36), (12, 192, 64, 1024), (1, 330, 608, 576)]
)
def test_they_are_as_exact_as_float32_is(batch, rows, inner, columns):
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(batch, rows, inner, generator=draw), torch.randn(batch, inner, columns, generator=draw)
    with float32_layers.by_onednn():
        found = torch.bmm(x, y).numpy()
    exact = x.numpy().astype(np.float64) @ y.numpy().astype(np.float64)
    terms = np.abs(x.numpy()).astype(np.float64) @ np.abs(y.numpy())
    assert (np.abs(found - exact) / terms).max() < inner * 2.0**-24


@pytest.mark.parametrize("pays", [True, False])
def test_the_setting_is_given_where_it_pays_and_taken_back(pays, monkeypatch):
    monkeypatch.setattr(float32_layers, "pays", lambda: pays)
    before, within = settings.fp32_precision, []

    def fail():
        with float32_layers.by_onednn():
            within.append(settings.fp32_precision)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert within == ["bf16" if pays else before]
    assert settings.fp32_precision == before
    with float32_layers.by_onednn(may_round=True):
        assert settings.fp32_precision == "bf16"
    assert settings.fp32_precision == before


@pytest.mark.parametrize(
    ("name", "kind", "capability", "pays"),
    [
        ("AMD EPYC 9R14", "AVX-512 BF16", "AVX512", True),
        ("AMD EPYC 9R14", "AVX-512 BF16", "AVX2", False),
        ("AMD Ryzen 9 3900X", "AVX2", "AVX2", False),
        ("AMD of some day", "AMX", "AVX512", False),
        ("Intel(R) Xeon(R) Platinum 8275CL", "AVX-512", "AVX512", False),
    ],
)
def test_it_pays_on_amds_processors_with_avx_512(name, kind, capability, pays, monkeypatch):
    monkeypatch.setattr(float32_layers, "this_cpu", lambda: Cpu(name, kind, 2))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert float32_layers.pays.__wrapped__() is pays
