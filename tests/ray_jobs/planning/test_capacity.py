"""What holds a base: the GPUs of a machine, its memory, and a pod's disk; and the bases that `init` proposes, against
the numbers of parameters that their makers and Keras Hub publish.
"""

import pytest
import torch

from components.config import config_file
from components.config.schema import ModelConfig, RunConfig
from components.shared.errors import ConfigError, UserError
from ray_jobs.base import base_model
from ray_jobs.base.base_model import Base
from ray_jobs.planning import capacity
from ray_jobs.planning.bases import BASES, fitting
from ray_jobs.planning.capacity import Device, disk_bytes
from ray_jobs.planning.rehearsal import ModelStats, Rehearsal
from tests.models.shapes import LLAMA_2_7B, LLAMA_2_70B
from tests.ray_jobs.conftest import CONFIG

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "expected"),
    [([], False), ([15], False), ([16], True), ([8, 8], True)],  # 12.6 GiB of weights, of 12.8 that 16 may take
)
def test_gpus_are_taken_where_together_they_hold_the_base(free, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index] * GIB, 80 * GIB))
    LLAMA_2_7B.save_pretrained(tmp_path)
    config = config_file.loads(CONFIG.format(base=tmp_path))
    assert capacity.on_gpus(config, Base("llama", tmp_path, {})) is expected


@pytest.mark.slow
def test_a_base_that_no_memory_here_holds_in_float32_is_refused_with_what_it_takes(tmp_path, monkeypatch):
    LLAMA_2_7B.save_pretrained(tmp_path)
    config, base = config_file.loads(CONFIG.format(base=tmp_path)), Base("llama", tmp_path, {})
    monkeypatch.setattr(capacity, "machine_bytes", lambda: 26 * GIB)
    capacity.require_float32(config, base)  # 6.74 billion weights of 4 bytes are 25.1 GiB
    monkeypatch.setattr(capacity, "machine_bytes", lambda: 25 * GIB)
    with pytest.raises(UserError, match="llama takes 25 GiB, and this machine has 25: do it on one with more memory"):
        capacity.require_float32(config, base)


@pytest.mark.gpu
@pytest.mark.parametrize("base_format", ["bf16", "nf4"])
def test_a_base_on_several_gpus_says_what_it_says_on_one(base_format, tiny_base):
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    config = ModelConfig(base=str(tiny_base))
    tokens = torch.arange(24)[None]
    said = []
    for across_gpus in (False, True):
        model = base_model.load_model(
            base_model.resolve(config), config, base_format, use_gpu=True, across_gpus=across_gpus
        )
        with torch.inference_mode():
            said.append(model(input_ids=tokens.to(model.device)).logits.float().cpu())
    assert len({parameter.device for parameter in model.parameters()}) > 1
    torch.testing.assert_close(*said, rtol=0.02, atol=0.02)


PARAMETERS = 68_976_648_192


def configured(*changes: str) -> RunConfig:
    return config_file.loads(CONFIG.format(base="llama-2-70b"), ["method.name=lora", *changes])


def in_pods(*changes: str) -> RunConfig:
    return configured("ray.cluster.kind=rayjob", "ray.use_gpu=true", "ray.gpu=H100", *changes)


@pytest.fixture(scope="module")
def stats() -> ModelStats:
    return Rehearsal.of(configured(), LLAMA_2_70B).stats


def test_a_base_that_a_pods_disk_does_not_hold_is_refused_before_it_is_downloaded(stats):
    needed = disk_bytes(in_pods(), LLAMA_2_70B, stats)
    assert needed == 2 * PARAMETERS
    with pytest.raises(ConfigError, match=r"writes 128 GiB .*disk_gib is 100, .* set ray\.cluster\.disk_gib=161"):
        in_pods().ray.require_disk("llama", needed)
    in_pods("ray.cluster.disk_gib=129").ray.require_disk("llama", needed)
    assert disk_bytes(configured(), LLAMA_2_70B, stats) is None


def test_a_base_in_nf4_that_the_run_makes_lies_beside_the_original(stats):
    """At 4.5 bits a weight with NF4's scales (arXiv:2305.14314, section 3), and what stays in 16 bits."""
    read, made = (in_pods("method.name=qlora", *more) for more in ([], ["method.init=loftq"]))
    both = disk_bytes(made, LLAMA_2_70B, stats)
    assert both - disk_bytes(read, LLAMA_2_70B, stats) > 4.5 / 8 * PARAMETERS


PUBLISHED = {
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-0.6B": 596_049_920,
}


@pytest.mark.slow
def test_shapes_have_as_many_parameters_as_are_published() -> None:
    tables = {"adapter": {"name": "a"}, "model": {"base": "org/model"}, "data": {"source": "rows.jsonl"}}
    config = config_file.validate(tables, ["ray.use_gpu=true", "train.gradient_checkpointing=true"])
    rows = list(fitting(config, Device("a large one", 2**40)))
    assert {row["base"]: row["parameters"] for row in rows} == PUBLISHED
    assert [row["base"] for row in rows] == [*BASES]
    needed = [row["memory_bytes"] for row in rows]
    assert needed == sorted(needed, reverse=True)
