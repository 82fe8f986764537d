"""What a version says of itself: its files, card and lineage, and what its training used, by hand."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import AutoTokenizer

from components.config import config_file
from components.config.schema import RunConfig
from components.records.steps import Usage
from components.registry import lineage
from components.registry.lineage import Asked, Dataset, Environment, Hardware, Lineage, Training
from components.registry.versions import pull_version, read_lineage
from components.store import client
from components.store.store import Store
from ray_jobs.adapters import build
from ray_jobs.base.base_model import Base
from ray_jobs.training.checkpoint import TrainingProgress
from ray_jobs.training.metrics_log import MetricsLog
from ray_jobs.training.publishing import model_card, recipe_of, usage_of
from ray_jobs.training.zero import Worker
from tests.models import chat_families
from tests.models.chat_families import FAMILIES
from tests.models.spec import changed, spec_of
from tests.models.zoo import on_no_device
from tests.ray_jobs.conftest import CONFIG
from tests.ray_jobs.training.in_store import in_store, published


@pytest.mark.parametrize(("name", "template_from"), [("none", "fineloop"), ("gemma", "base")])
def test_a_version_holds_what_it_was_asked_with(config, store, tmp_path, name, template_from):
    folder = chat_families.build(tmp_path / "base", FAMILIES[name])
    config = in_store(config, store, f"model.base={folder}")
    version = published(config, store)
    shutil.rmtree(folder)  # a server has the adapter's folder alone
    pull_version(store, version, tmp_path / "pulled")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pulled")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "sky"}], tokenize=False)
    assert asked == {"none": "<s>sky\n\n", "gemma": "<bos><start_of_turn>user\nsky<end_of_turn>\n"}[name]
    assert read_lineage(store, version)["recipe"]["chat"]["template_from"] == template_from
    assert "| Chat template | " in (tmp_path / "pulled" / "README.md").read_text()


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


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("before", "with_parents"), [(0.0, 2e12), (5e12, 7e12), (None, None)])
@pytest.mark.usefixtures("group")
def test_hours_are_of_all_workers_and_operations_of_all_tokens(
    config: RunConfig, store: Store, before: float | None, with_parents: float | None
) -> None:
    spec = spec_of(config, run_id="used", flops_per_token=2e9, flops_before=before)
    four = Worker(0, 4, torch.device("cpu"))
    progress = TrainingProgress("", 4, step=10, tokens=1000, elapsed_s=1350.0)
    metrics = MetricsLog(store, "used")
    asked = client.so_far().requests
    used = usage_of(spec, four, progress, metrics, seconds=1800)
    assert used == Usage.model_validate_json(used.model_dump_json())  # as finetune.json and lineage.json hold it
    assert (used.hours, used.in_steps_s, used.tokens) == (2.0, 5400.0, 1000)
    assert (used.flops, used.flops_with_parents) == (2e12, with_parents)
    assert (used.price, used.restarts, used.s3_requests) == (None, 0, asked)
    assert usage_of(spec, four, progress, None, seconds=1800) is None


def card(config: RunConfig, *, eval_loss: float | None = 0.25, **recipe: Any) -> str:
    record = Lineage(
        Asked.of(config),
        run_id="20260101-000000-colours-ab12",
        base=lineage.Base(config.model.base, {"kind": "folder", "sha256": "5" * 64}),
        dataset=Dataset("d0123", "s3://b/datasets/d0123", "0" * 64, 1200, 100),
        environment=Environment("3.11.0", "Linux", {}),
        hardware=Hardware("Xeon", cpus_per_worker=1, workers=1),
        recipe={
            "adapter": "lora",
            "base": "bf16",
            "trainable_parameters": 10_000,
            "parameters": 2_000_000,
            "trainable_share": 0.005,
            "serving": {"servable_as": "lora", "notes": []},
            **recipe,
        },
        training=Training(75, 58_457, 0.5, eval_loss, 177.4, 2),
    ).as_json()
    return model_card(config, record)


def test_the_card_says_what_the_adapter_was_made_from_and_how_it_is_asked_and_served(config):
    chat = {"template_from": "base", "template_kwargs": {"enable_thinking": False}, "stops": ["<eos>", "<end>"]}
    serving = {"servable_as": "lora-export", "notes": ["one sentence"]}
    loftq = changed(config, "method.name=loftq")
    text = card(loftq, chat={**chat, "template_sha256": "0" * 64}, serving=serving, stands_on="s3://b/bases/b0")
    _, front, body = text.split("---\n", 2)
    about = {"library_name": "peft", "base_model": config.model.base, "tags": ["lora", "fineloop"]}
    assert yaml.safe_load(front) == about
    made_from = ["`20260101-000000-colours-ab12`", "sha256 `5555", "1200 records trained on, 100 held out"]
    made_from += ["10,000 of 2,000,000 (0.50%)", "75 steps, 58,457 tokens, 177 s on 2 workers", "`s3://b/bases/b0`"]
    asked = ["the base's own", "`<eos>`, `<end>`", "`enable_thinking=false`"]
    served = ["fineloop adapters export --lora", "- One sentence."]
    assert [fact for fact in [*made_from, "0.2500 nats", *asked, *served] if fact not in body] == []
    plain = card(config, eval_loss=None, chat={"template_from": "fineloop", "template_sha256": "0", "stops": ["</s>"]})
    assert "| Held-out loss | not measured |" in plain
    assert "Fineloop's, as the base has none" in plain
    assert "Servers of LoRA adapters load it as it is." in plain
    assert "Stands on" not in plain
