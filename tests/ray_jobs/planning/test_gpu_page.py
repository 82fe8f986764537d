"""The configs of docs/gpu.md: short, and each planned for the GPU that it names."""

import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

from components.config import config_file
from components.config.schema import RunConfig
from ray_jobs.plan import planned
from ray_jobs.planning.capacity import named_device
from ray_jobs.planning.memory import GIB
from ray_jobs.text.answer_loss import chunk_positions
from ray_jobs.training import zero
from tests.models.shapes import LLAMA_3_8B, LLAMA_3_70B

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "gpu.md").read_text(encoding="utf-8")
CONFIGS = re.findall(r"^```toml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
SLOW = pytest.mark.slow
START_MIN = (0.3, 6.8, 6.8)
"""Minutes until the first step: 16 GB, or 141 GB and rank 0's first check on eight cores."""


def by_papers(config: RunConfig, shape: LlamaConfig) -> float:
    """Bytes of a GPU by what papers say of each part, from the shape alone. Allocators' waste is in none of them."""
    h, m, layers, v = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, shape.vocab_size
    kv = h * shape.num_key_value_heads // shape.num_attention_heads
    tokens = config.train.micro_batch_size * config.model.max_length
    rank, workers = config.method.r, config.ray.max_workers
    # QLoRA, arXiv:2305.14314, section 3: 4 bits a weight, and 0.127 of its constants, which are no parameters to ZeRO.
    matrices = layers * (2 * h * h + 2 * h * kv + 3 * h * m)
    constants, whole = matrices * 0.127 / 8, matrices / 2 + 2 * (2 * v * h)
    # ZeRO, arXiv:1910.02054, section 3.1: 2 + 2 + 12 bytes a trained parameter; stage 3 shares out all of them.
    trained = layers * rank * (2 * 2 * h + 2 * (h + kv) + 3 * (h + m))
    is_shared = config.train.zero_stage == 3
    states = constants + (whole + 16 * trained) / (workers if is_shared else 1)
    # Korthikanti et al., arXiv:2205.05198, table 2: a layer's input is kept, and one layer whole, without its scores.
    inputs, layer = 2 * tokens * h * layers, 34 * tokens * h
    # Each logit in float32 with its gradient, and in bfloat16, while no layer is whole.
    logits = 10 * v * (tokens if is_shared else chunk_positions(v))
    dequantised, context = 2 * h * m, 0.7 * GIB
    settings = zero.settings(config)["zero_optimization"]
    buffers = 0
    if is_shared:  # the embedding is the largest that is gathered
        buckets = settings["reduce_bucket_size"] + settings["allgather_bucket_size"]
        buffers = 2 * (buckets + settings["stage3_max_live_parameters"] + v * h)
    return states + inputs + max(layer, logits) + dequantised + context + buffers


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
    assert body["memory_bytes"]["total"] == pytest.approx(by_papers(config, shape), rel=0.05)
    start = body["start"]
    assert start["node_bytes"] == 2 * body["parameters"]
    assert sum(start["seconds"].values()) / 60 == pytest.approx(START_MIN[place], abs=0.5)
    if place == 0:
        total, memory = body["memory_bytes"]["total"] / GIB, body["device_memory_bytes"] / GIB
        assert f"takes {total:.1f} of an A10G's {memory:.1f} GiB" in PAGE
