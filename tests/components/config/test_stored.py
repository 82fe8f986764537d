"""What running a version takes of the config that its own run was stored with."""

import re
from pathlib import Path
from typing import Any

import pytest

from components.config import config_file
from components.shared.errors import ConfigError

FROZEN = Path(__file__).resolve().parents[2] / "frozen" / "icd10.toml"


def test_of_a_stored_config_only_the_base_and_the_method_are_read_whatever_else_it_holds():
    config = config_file.load(FROZEN)
    stored = {"model": {"base": "org/old", "max_length": 64, "gone": 1}, "method": {"name": "dora", "base": "int8"}}
    found = config_file.with_stored(config, {**stored, "train": "of another shape", "new": {}}, origin="lineage")
    assert (found.model.base, found.model.max_length, found.method.name) == ("org/old", 64, "dora")
    assert found.train == config.train


def test_only_the_callers_config_lets_a_stored_base_run_code():
    stored = {"model": {"base": "org/odd", "trust_remote_code": True}, "method": {"name": "lora"}}
    wanted = r"lineage: its base org/odd .*allows none.* set model\.base=org/odd model\.trust_remote_code=true"
    with pytest.raises(ConfigError, match=wanted):
        config_file.with_stored(config_file.load(FROZEN), stored, origin="lineage")
    trusting = config_file.load(FROZEN, ["model.trust_remote_code=true", "model.base=org/odd"])
    assert config_file.with_stored(trusting, stored, origin="lineage").model.trust_remote_code
    plain = {**stored, "model": {"base": "org/plain"}}
    assert not config_file.with_stored(trusting, plain, origin="lineage").model.trust_remote_code


ONE, OTHER = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    ("own", "stored", "commit", "runs"),
    [
        ({"base": "org/good"}, {"base": "org/good"}, ONE, True),
        ({"base": "org/good"}, {"base": "org/evil"}, ONE, False),
        ({"base": "org/good", "revision": "main"}, {"base": "org/good", "revision": "refs/pr/1"}, ONE, False),
        ({"base": "org/good", "revision": ONE}, {"base": "org/good", "revision": ONE}, OTHER, False),
        ({"base": "org/good", "revision": ONE}, {"base": "org/good"}, ONE, True),
        ({"base": "/a/folder"}, {"base": "/a/folder"}, "", True),
    ],
)
def test_consent_to_code_is_for_the_configs_own_base_and_revision(
    own: dict[str, str], stored: dict[str, str], commit: str, runs: bool
):
    config = config_file.load(FROZEN, ["model.trust_remote_code=true", *(f"model.{k}={v}" for k, v in own.items())])
    lineage = {"model": {**stored, "trust_remote_code": True}, "method": {"name": "lora"}}
    if runs:
        assert config_file.with_stored(config, lineage, origin="lineage", commit=commit).model.trust_remote_code
        return
    with pytest.raises(ConfigError, match=rf"its base {stored['base']} at \S+ comes with .* of org/good alone"):
        config_file.with_stored(config, lineage, origin="lineage", commit=commit)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"method": {"name": "lora"}}, "lineage: model cannot be used by this release: base: Field required"),
        ({"model": {"base": "a"}, "method": {"name": "pissa"}}, "lineage: method cannot be used by this release: name"),
    ],
)
def test_a_stored_config_without_what_is_needed_is_refused_with_the_field(stored: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_file.with_stored(config_file.load(FROZEN), stored, origin="lineage")


def test_a_config_with_the_copy_that_is_no_longer_kept_is_read_where_it_asked_for_none():
    text = config_file.dumps(config := config_file.load(FROZEN))
    assert config_file.loads(text.replace("[model]", "[model]\nkeep_nf4 = false")) == config
    stored = {**config_file.as_table(config), "model": {"base": "org/base", "keep_nf4": True}}
    assert config_file.with_stored(config, stored, origin="lineage").model.base == "org/base"
