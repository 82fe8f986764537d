"""What the driver refuses before any worker is started."""

import json

import pytest

from components.config import config_file
from components.shared.errors import ConfigError
from ray_jobs import finetune
from tests.models.tiny import colour_rows


def changed(config, *overrides):
    return config_file.loads(config_file.dumps(config), overrides)


def test_a_context_beyond_the_bases_positions_is_refused_before_any_worker(config, store, tmp_path):
    source = tmp_path / "colours.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(40)))
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}", f"data.source={source}"]
    with pytest.raises(ConfigError, match=r"model\.max_length 513 is more than the 512 positions"):
        finetune.finetune(changed(config, *place, "model.max_length=513"), run_id="r0")
