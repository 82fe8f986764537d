"""What CPU workers multiply in and with, and what they do with freed memory."""

import json
import platform
import resource
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, GPT2Config

from components.config.schema import RunConfig
from components.shared.machine import Cpu
from ray_jobs.kernels import door, float32_layers
from tests.models.spec import changed
from tests.models.train_group import in_group

FAST, SLOW = 0.5, 15.9
"""How many times as fast float32 is, on one thread: AVX-512 BF16 (Zen 4), and AVX2; torch 2.13."""


@pytest.mark.parametrize(
    ("measured", "dtype"),
    [([FAST], "bfloat16"), ([SLOW], "float32"), ([1.1], "bfloat16"), ([FAST, 2.4], "float32"), ([2.4, 0.2], "float32")],
)
def test_float32_is_taken_where_it_is_clearly_faster_for_one_worker(measured: list[float], dtype: str):
    assert door.faster(measured).dtype == dtype


def test_the_config_decides_without_a_measurement(config: RunConfig):
    shape = GPT2Config()

    def chosen(wanted: str, *, on_gpu: bool = False) -> str:
        return door.choose(changed(config, f"ray.cpu_matmul_dtype={wanted}"), shape, on_gpu=on_gpu).dtype

    with mock.patch.object(door, "measure", side_effect=AssertionError("measured")):
        assert chosen("bfloat16") == "bfloat16"
        assert chosen("float32") == "float32"
        assert chosen("auto", on_gpu=True) == "bfloat16"
    with mock.patch.object(door, "measure", return_value=SLOW):
        assert chosen("auto") == "float32"


def agreed(groups: list[list[float]], config: RunConfig) -> list[str]:
    """In a rank: what each group agrees on when this one measures its own."""
    found = []
    for ratios in groups:
        with mock.patch.object(door, "measure", return_value=ratios[dist.get_rank()]):
            found.append(door.agree(config, GPT2Config()).dtype)
    return found


@pytest.mark.slow
def test_workers_on_unlike_processors_agree(config: RunConfig, tmp_path: Path):
    groups = [[FAST, FAST], [FAST, SLOW], [SLOW, FAST]]
    both = in_group(agreed, groups, config, directory=tmp_path, num_workers=2)
    assert both == [["bfloat16", "float32", "float32"]] * 2


def test_the_layer_that_is_measured_is_the_feed_forwards_of_any_architecture(tiny_base: Path):
    written = json.loads((tiny_base / "config.json").read_text())
    assert door.typical_shape(AutoConfig.from_pretrained(tiny_base)) == (written["intermediate_size"], 64)
    assert door.typical_shape(GPT2Config(n_embd=96)) == (384, 96)


settings = torch.backends.mkldnn.matmul


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
        ("Intel(R) Xeon(R) Platinum 8275CL", "AVX-512", "AVX512", False),
    ],
)
def test_it_pays_on_amds_processors_with_avx_512(name, kind, capability, pays, monkeypatch):
    monkeypatch.setattr(float32_layers, "this_cpu", lambda: Cpu(name, kind, 2))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert float32_layers.pays.__wrapped__() is pays


STEPS = """
import ctypes, resource
import torch
from ray_jobs.kernels import door

def resident():  # proc(5), statm, in pages of 4 KiB
    return int(open("/proc/self/statm").read().split()[1]) * 4096

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault for each small page, also where pages are huge
door.keep_freed_memory()
def step():
    return [torch.zeros(12 * 2**20) for _ in range(4)]  # 48 MiB each

start = resident()
for _ in range(8):  # until the heap has found its places
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
faults, kept = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, resident() - start
door.give_back()
print(faults, kept, resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
@pytest.mark.slow
def test_memory_that_was_freed_is_not_asked_for_again_but_can_be_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    faults, kept, left = map(int, done.stdout.split())
    assert faults < 0.1 * (10 * 4 * 48 * 2**20 // resource.getpagesize())  # as it is, each page is asked for each time
    assert kept > 150 * 2**20 > 10 * left
