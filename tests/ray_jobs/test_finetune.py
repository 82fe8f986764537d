"""What the driver refuses before any worker is started."""

import json

import pytest

from components.config import config_file
from components.prepare.dataset import Message, Record
from components.shared.errors import ConfigError, DataError
from ray_jobs import finetune
from ray_jobs.base import base_model, chat_format
from tests.models.tiny import colour_rows


def changed(config, *overrides):
    return config_file.loads(config_file.dumps(config), overrides)


def records(*lengths):
    return [Record(f"r{place}", [Message("user", "x" * length)], "blue") for place, length in enumerate(lengths)]


@pytest.fixture
def chat(config):
    return chat_format.load(base_model.resolve(config.model), config.model)


def test_prompts_that_are_cut_are_counted_and_limited_as_answers_are(config, chat, capsys):
    most = changed(config, "data.max_reject_share=0.25")
    split = finetune._tokenized(records(10, 100, 10, 10), chat, most)
    assert (len(split), split.cut, split.too_long) == (4, ["r1"], [])
    assert "cut 1 prompts at their beginning: they do not fit model.max_length 64" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"the prompts of 2 of 4 records \(50%; as 'r1'\) are too long for model\.max"):
        finetune._tokenized(records(10, 100, 100, 10), chat, most)


def test_a_context_beyond_the_bases_positions_is_refused_before_any_worker(config, store, tmp_path):
    source = tmp_path / "colours.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(40)))
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}", f"data.source={source}"]
    with pytest.raises(ConfigError, match=r"model\.max_length 513 is more than the 512 positions"):
        finetune.finetune(changed(config, *place, "model.max_length=513"), run_id="r0")
