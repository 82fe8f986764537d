"""Every form of `model.base`, what a base's configuration says, and what of it limits a config."""

import json
from pathlib import Path

import pytest
from transformers import BloomConfig, Gemma3Config, GPT2Config, LlamaConfig, Qwen2Config

from components.config import config_file
from components.config.schema import ModelConfig
from components.shared.errors import ConfigError
from components.store.store import Store
from ray_jobs.base import base_model
from tests.models.shapes import small


def test_of_an_s3_folder_the_config_alone_is_read(store: Store):
    body = json.dumps(small().to_dict()).encode()
    store.put("bases/small/config.json", body)
    store.put("bases/small/model.safetensors", b"never read")
    assert base_model.read_config(ModelConfig(base=store.uri("bases/small/"))).hidden_size == 128
    store.put("bases/empty/README.md", b"nothing")
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        base_model.read_config(ModelConfig(base=store.uri("bases/empty/")))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("{tmp}/nowhere", "there is no such folder"),
        ("{tmp}", r"no config\.json there"),
        ("ftp://host/model", "expected a hub id"),
        ("~/no-such-folder", "there is no such folder"),
        ("a/b/c", "neither a local folder nor a hub id"),
        ("org/model", "the model hub cannot be reached"),
        ("pkg://no_such_package/x.gguf", "'no_such_package' is not installed"),
        ("pkg://json.decoder/x.gguf", "'json.decoder' is not installed"),
        ("pkg://this/x.gguf", "'this' is not installed"),
        ("pkg://json/__init__.py", r"holds no '__init__.py'; its GGUF files are \[\]"),
    ],
)
def test_a_base_that_is_not_there_is_the_users_mistake(base, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read in (base_model.read_config, base_model.resolve):
        with pytest.raises(ConfigError, match=message):
            read(ModelConfig(base=base.format(tmp=tmp_path)))


def test_a_configuration_that_transformers_does_not_know_is_the_users_mistake(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(ConfigError, match="cannot read its configuration"):
        base_model.read_config(ModelConfig(base=str(tmp_path)))


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (GPT2Config(), 1024),  # n_positions, which it has learned one by one
        (BloomConfig(), None),  # ALiBi: distances, no positions
        (LlamaConfig(max_position_embeddings=4096, rope_parameters={"rope_type": "linear", "factor": 8.0}), 32768),
        # Qwen2.5's model card, on texts longer than 32,768 tokens: YaRN with a factor of 4 reaches 131,072.
        (
            Qwen2Config(
                max_position_embeddings=32768,
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            ),
            131072,
        ),
        # Llama 3.1's config.json names what it reaches after its scaling by 8.
        (
            LlamaConfig(
                max_position_embeddings=131072,
                rope_parameters={
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                },
            ),
            131072,
        ),
        (Gemma3Config(text_config={"max_position_embeddings": 8192}), 8192),
    ],
)
def test_how_long_a_text_the_base_has_positions_for(base, expected):
    assert base_model.positions(base) == expected


TABLE = {"adapter": {"name": "a"}, "model": {"base": "gpt2"}, "data": {"source": "x.jsonl"}, "method": {"name": "lora"}}


def test_a_context_that_nobody_set_is_no_longer_than_the_base_has_positions_for():
    said: list[str] = []
    written = config_file.dumps(config_file.validate(TABLE))  # as a run's steps hand it on
    config = base_model.fitted(config_file.loads(written), GPT2Config(n_positions=512), said.append)
    assert config.model.max_length == 512
    assert said == ["model.max_length: 512, all the positions that gpt2 has"]
    assert config.digest == config_file.validate(TABLE, ["model.max_length=512"]).digest
    assert base_model.fitted(config, GPT2Config(n_positions=512), said.append) == config
    for roomy in (GPT2Config(n_positions=2048), BloomConfig()):
        assert base_model.fitted(config_file.loads(written), roomy, said.append).model.max_length == 1024
    assert len(said) == 1


def test_a_context_that_was_set_beyond_the_positions_is_refused_and_the_positions_are_not():
    for length in (1024, 1025):  # the default as well, where it was set
        config = config_file.loads(config_file.dumps(config_file.validate(TABLE, [f"model.max_length={length}"])))
        reason = rf"model\.max_length {length} is more than the {length - 1} positions of model\.base gpt2"
        with pytest.raises(ConfigError, match=reason):
            base_model.fitted(config, GPT2Config(n_positions=length - 1), pytest.fail)
        assert base_model.fitted(config, GPT2Config(n_positions=length), pytest.fail) == config


def test_a_context_that_is_lowered_leaves_room_for_the_answers_that_were_asked_for():
    config = config_file.validate(TABLE, ["evaluate.max_new_tokens=600"])
    with pytest.raises(
        ConfigError, match=r"base gpt2: evaluate\.max_new_tokens 600 leaves no room .* model\.max_length 512"
    ):
        base_model.fitted(config, GPT2Config(n_positions=512), [].append)


def test_a_folder_of_the_users_home_is_planned_and_trained(tiny_base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(tiny_base)
    config = ModelConfig(base="~/model")
    assert base_model.resolve(config).path == tmp_path / "model"
    assert base_model.read_config(config).hidden_size == 64
    assert base_model.locate(config) == tmp_path / "model"
