from typing import Any

import yaml

from components.config import config_file
from components.config.schema import RunConfig
from components.registry.lineage import Asked, Base, Dataset, Environment, Hardware, Lineage, Training
from ray_jobs.training.publishing import model_card


def card(config: RunConfig, *, eval_loss: float | None = 0.25, **recipe: Any) -> str:
    record = Lineage(
        Asked.of(config),
        run_id="20260101-000000-colours-ab12",
        base=Base(config.model.base, {"kind": "folder", "sha256": "5" * 64}),
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


def test_the_front_matter_is_what_model_hubs_read(config):
    _, front, body = card(config).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "base_model": config.model.base,
        "tags": ["lora", "fineloop"],
    }
    assert body.strip().startswith("# colours\n")


def test_the_card_says_what_the_adapter_was_made_from(config):
    text = card(config)
    for fact in (
        "run\n`20260101-000000-colours-ab12`",
        "sha256 `5555",
        "loaded as bf16",
        "`d0123`: 1200 records trained on, 100 held out",
        "10,000 of 2,000,000 (0.50%)",
        "75 steps, 58,457 tokens, 177 s on 2 workers",
        "0.2500 nats per answer token",
    ):
        assert fact in text


def test_the_card_says_how_the_adapter_is_asked(config):
    own = card(config, chat={"template_from": "base", "template_sha256": "0" * 64, "stops": ["<eos>", "<end>"]})
    assert "| Chat template | the base's own, beside this file with the tokenizer. Answers end with" in own
    assert "Answers end with `<eos>`, `<end>` |" in own
    plain = card(config, chat={"template_from": "fineloop", "template_sha256": "0" * 64, "stops": ["</s>"]})
    assert "| Chat template | Fineloop's, as the base has none, beside this file" in plain
    quiet = {"template_from": "base", "template_kwargs": {"enable_thinking": False}, "stops": ["<end>"]}
    assert "to be asked with `enable_thinking=false` (`chat_template_kwargs`)." in card(config, chat=quiet)


def test_a_loss_that_was_not_measured_is_not_made_up(config):
    assert "| Held-out loss | not measured |" in card(config, eval_loss=None)


def test_the_card_says_how_the_version_is_served(config):
    text = card(config)
    assert "## Serving\n\nServers of LoRA adapters load it as it is.\n" in text
    vera = {"servable_as": "lora-export", "notes": ["one sentence", "another"]}
    text = card(config, serving=vera)
    assert "load what `fineloop adapters export --lora` makes of it.\n\n- One sentence.\n- Another.\n" in text


def test_the_card_names_the_base_of_its_own_where_there_is_one(config):
    assert "Stands on" not in card(config)
    loftq = config_file.loads(config_file.dumps(config), ["method.name=loftq"])
    text = card(loftq, stands_on="s3://b/bases/b0")
    assert "loaded as bf16 |\n| Stands on | `s3://b/bases/b0`" in text
    assert "--with-base` fetches both |\n| Data |" in text
    assert "from_pretrained(BASE_FOLDER)  # s3://b/bases/b0\n" in text
