"""Every form of `model.base`, and that all who read one take the same."""

from pathlib import Path

import pytest

from components.config.schema import ModelConfig
from components.shared.errors import ConfigError
from ray_jobs.base import base_model
from ray_jobs.base.local_cache import local_path
from tests.models.tiny_gguf import build_package


def test_each_form_is_what_it_says(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert [local_path(each) for each in ("org/name", "gpt2", "s3://bucket/folder/")] == [None] * 3
    assert local_path(str(tiny_base)) == tiny_base
    gguf = build_package(tiny_base, tmp_path, "packaged_weights", "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert local_path("pkg://packaged_weights/tiny.gguf") == gguf


def test_a_folder_of_the_users_home_is_planned_and_trained(tiny_base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(tiny_base)
    config = ModelConfig(base="~/model")
    assert base_model.resolve(config).path == tmp_path / "model"
    assert base_model.read_config(config).hidden_size == 64
    assert base_model.locate(config) == tmp_path / "model"


@pytest.mark.parametrize(
    "reference", ["ftp://host/model", "/no/such/folder", "./none", "~/none", "pkg://nowhere/a.gguf"]
)
def test_what_is_nothing_is_refused_by_all_alike(reference: str):
    said = set()
    for read in (base_model.resolve, base_model.read_config, base_model.locate):
        with pytest.raises(ConfigError) as caught:
            read(ModelConfig(base=reference))
        said.add(str(caught.value))
    assert len(said) == 1
