"""Who decides what CPU workers multiply in: the rates of each class of processor, a real measurement, and a group."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, GPT2Config

from components.config import config_file
from components.config.schema import RunConfig
from ray_jobs.kernels import door
from tests.models.train_group import in_group

FAST, SLOW = 0.5, 15.9
"""How many times as fast float32 is, on one thread: AVX-512 BF16 (Zen 4), and AVX2; torch 2.13."""
SHAPE = (1536, 576)


@pytest.mark.parametrize(
    ("measured", "dtype"),
    [([FAST], "bfloat16"), ([SLOW], "float32"), ([1.1], "bfloat16"), ([FAST, 2.4], "float32"), ([2.4, 0.2], "float32")],
)
def test_float32_is_taken_where_it_is_clearly_faster_for_one_worker(measured: list[float], dtype: str):
    assert door.faster(measured).dtype == dtype


def test_what_else_the_machine_does_decides_nothing():
    """A busy machine takes the processor away in the middle of a product, as a sleep does."""
    linear, threads = torch.nn.functional.linear, torch.get_num_threads()

    def interrupted(*arguments: Any) -> torch.Tensor:
        time.sleep(0.1)
        return linear(*arguments)

    torch.set_num_threads(1)
    try:
        alone = door.measure(SHAPE)
        with mock.patch.object(torch.nn.functional, "linear", interrupted):
            found = door.measure(SHAPE)
    finally:
        torch.set_num_threads(threads)
    assert found < 5 * alone


def test_the_config_decides_without_a_measurement(config: RunConfig):
    shape = GPT2Config()

    def chosen(wanted: str, *, on_gpu: bool = False) -> str:
        asked = config_file.loads(config_file.dumps(config), [f"ray.cpu_matmul_dtype={wanted}"])
        return door.choose(asked, shape, on_gpu=on_gpu).dtype

    with mock.patch.object(door, "measure", side_effect=AssertionError("measured")):
        assert chosen("bfloat16") == "bfloat16"
        assert chosen("float32") == "float32"
        assert chosen("auto", on_gpu=True) == "bfloat16"
    with mock.patch.object(door, "measure", return_value=SLOW):
        assert chosen("auto") == "float32"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="takes instructions of x86-64 away")
@pytest.mark.parametrize(
    "taken_away",
    [
        pytest.param({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, id="AVX2", marks=pytest.mark.slow),
        pytest.param({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, id="AVX-512 without BF16", marks=pytest.mark.full),
    ],
)
def test_a_processor_without_bfloat16_is_recognised_by_measuring(taken_away: dict[str, str]):
    script = f"from ray_jobs.kernels.door import faster, measure; print(faster([measure({SHAPE})]).dtype)"
    environment = {**os.environ, **taken_away, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["float32"]


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
