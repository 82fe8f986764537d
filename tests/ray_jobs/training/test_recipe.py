"""What the lineage says was built, against the model that was built."""

from pathlib import Path
from typing import Any

import pytest
import torch

from components.config import config_file
from ray_jobs.adapters import build
from ray_jobs.base.base_model import Base
from ray_jobs.training.publishing import recipe_of
from ray_jobs.training.zero import Worker
from tests.models.zoo import on_no_device
from tests.ray_jobs.conftest import CONFIG


@pytest.fixture
def recipe(tiny_base: Path):
    """An adapted model of an architecture, and what is said of it; the tokenizer is the tiny base's."""
    base = Base(str(tiny_base), tiny_base, {})

    def built(name: str, *settings: str) -> tuple[Any, dict[str, Any]]:
        config = config_file.loads(CONFIG.format(base=tiny_base), settings)
        with torch.device("meta"):
            adapted = build.attach(on_no_device(name), config.method, base_reference="x", seed=0)
        return adapted, recipe_of(config, adapted, base, base, Worker(0, 1, torch.device("cpu")))

    return built


def test_the_lineage_names_every_kind_of_weight_that_is_trained(recipe):
    adapted, found = recipe("Mixtral")
    assert found["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert found["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    # Two layers of 64 wide attention with 32 wide keys and values; four experts of 128; rank 8.
    attention = 8 * (2 * (64 + 64) + 2 * (64 + 32))
    experts = 4 * 8 * ((64 + 256) + (128 + 64))
    assert found["trainable_parameters"] == 2 * (attention + experts)
    assert found["trainable_parameters"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_adapted_experts_are_served_merged_and_the_reason_is_named(recipe):
    serving = recipe("Mixtral")[1]["serving"]
    assert serving["servable_as"] == "merged"
    assert serving["notes"][0] == "vLLM is not known to wrap experts.down_proj, experts.gate_up_proj"
    assert recipe("Mixtral", "method.target_modules=['q_proj']")[1]["serving"]["servable_as"] == "lora"


def test_a_router_that_was_asked_for_is_named(recipe):
    found = recipe("Mixtral", "method.target_modules=['q_proj', 'gate']")[1]
    assert (found["target_modules"], found["target_parameters"]) == (["q_proj"], ["gate.weight"])
