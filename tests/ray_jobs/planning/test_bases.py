"""The bases that `init` proposes, against the numbers of parameters that their makers and Keras Hub publish."""

import pytest

from components.config import config_file
from ray_jobs.planning.bases import BASES, fitting
from ray_jobs.planning.capacity import Device

PARAMETERS = {
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
    assert {row["base"]: row["parameters"] for row in rows} == PARAMETERS
    assert [row["base"] for row in rows] == [*BASES]
    needed = [row["memory_bytes"] for row in rows]
    assert needed == sorted(needed, reverse=True)
