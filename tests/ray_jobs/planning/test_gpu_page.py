"""The configs of docs/gpu.md: short, and each planned for the GPU that it names."""

import re
from pathlib import Path

import pytest

from components.config import config_file
from ray_jobs.plan import planned
from ray_jobs.planning.capacity import named_device
from ray_jobs.planning.memory import GIB
from tests.models.shapes import LLAMA_3_8B, LLAMA_3_70B

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "gpu.md").read_text(encoding="utf-8")
CONFIGS = re.findall(r"^```toml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("place", "shape", "workers"),
    [(0, LLAMA_3_8B, 1), pytest.param(1, LLAMA_3_70B, 8, marks=SLOW), pytest.param(2, LLAMA_3_70B, 16, marks=SLOW)],
    ids=["one card", "eight cards", "two nodes"],
)
def test_a_config_of_the_page_is_short_and_fits(place, shape, workers):
    text = CONFIGS[place]
    assert len(text.splitlines()) <= 8
    config = config_file.loads(text)
    assert config.ray.max_workers == workers
    body = planned(config, shape, named_device(config))
    assert body["fits"]
    assert body["start"]["node_bytes"] == 2 * body["parameters"]
    if place == 0:
        total, memory = body["memory_bytes"]["total"] / GIB, body["device_memory_bytes"] / GIB
        assert f"takes {total:.1f} of an A10G's {memory:.1f} GiB" in PAGE
