import io
import json

import pytest

from components.config.schema import ModelConfig
from components.registry.store import Store
from components.shared.errors import ConfigError
from ray_jobs.base import base_config
from tests.models.shapes import LLAMA_2_7B, small


def test_a_folder_with_nothing_but_a_config_will_do(tmp_path):
    LLAMA_2_7B.save_pretrained(tmp_path)
    read = base_config.read(ModelConfig(base=str(tmp_path)))
    assert (read.model_type, read.num_hidden_layers, read.hidden_size) == ("llama", 32, 4096)


def test_of_an_s3_folder_the_config_alone_is_read(store: Store):
    body = json.dumps(small().to_dict()).encode()
    store.put("bases/small/config.json", body)
    store.put("bases/small/model.safetensors", b"never read")
    assert base_config.read(ModelConfig(base=store.uri("bases/small/"))).hidden_size == 128


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("{tmp}/nowhere", "there is no such folder"),
        ("{tmp}", r"no config\.json there"),
        ("ftp://host/model", "expected a hub id"),
        ("not a hub id", "neither a local folder nor a hub id"),
        ("org/model", "the model hub cannot be reached"),
        ("pkg://no_such_package/x.gguf", "'no_such_package' is not installed"),
        ("pkg://json/x.gguf", "holds no 'x.gguf'"),
    ],
)
def test_a_base_that_is_not_there_is_the_users_mistake(base, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=message):
        base_config.read(ModelConfig(base=base.format(tmp=tmp_path)))


def test_an_s3_folder_without_a_config_is_no_model(store: Store):
    store.put("bases/empty/README.md", io.BytesIO(b"nothing").getvalue())
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        base_config.read(ModelConfig(base=store.uri("bases/empty/")))


def test_a_configuration_that_transformers_does_not_know_is_the_users_mistake(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(ConfigError, match="cannot read its configuration"):
        base_config.read(ModelConfig(base=str(tmp_path)))
