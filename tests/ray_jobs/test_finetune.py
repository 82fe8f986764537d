"""What the driver refuses before any worker is started."""

import json
from dataclasses import replace

import pytest

from components.config import config_file
from components.prepare.dataset import Message, Record
from components.registry.between_runs import erase
from components.shared.errors import ConfigError, DataError
from ray_jobs import finetune
from ray_jobs.prepare import prepare
from ray_jobs.preview import previewed
from ray_jobs.sweep import sweep
from tests.doubles import datasets
from tests.models.tiny import colour_rows


@pytest.mark.parametrize("job", [finetune.run, sweep])
def test_a_dataset_with_an_erased_record_is_refused_before_the_base_is_read(job, placed, store):
    record = Record("r", [Message("user", "q")], "a")
    uri = datasets.publish(store, train=[record], evaluation=[replace(record, id="e")]).uri
    erase(store, "e", by="ann")
    with pytest.raises(DataError, match="holds 1 record that was erased after it was made"):
        job(placed("model.base=nowhere/at-all"), run_id="r0", dataset_uri=uri)


@pytest.mark.parametrize("job", [finetune.run, sweep])
def test_flash_attention_that_is_not_installed_is_refused_before_the_data_are_read(job, placed, store):
    on_gpus = placed("ray.use_gpu=true", "model.attention=flash_attention_2")
    with pytest.raises(ConfigError, match=r"model\.attention flash_attention_2: .* is not installed"):
        job(on_gpus, run_id="r0", dataset_uri=store.uri("nowhere"))


@pytest.mark.parametrize("job", [finetune.run, sweep])
def test_a_context_that_nobody_set_is_what_the_base_has_positions_for(job, placed, tmp_path, capsys):
    """The answers fit the default and not the base, so that the length in force is named before any worker."""
    source = tmp_path / "long.jsonl"
    source.write_text("".join(json.dumps({**row, "completion": "x" * 600}) + "\n" for row in colour_rows(40)))
    table = config_file.as_table(placed(f"data.source={source}"))
    del table["model"]["max_length"]
    unset = config_file.validate(table)
    with pytest.raises(DataError, match=r"too long for model\.max_length 512, and none is ever cut"):
        job(unset, run_id="r0", dataset_uri=prepare(unset, "test"))
    said = f"model.max_length: 512, all the positions that {unset.model.base} has"
    assert said in capsys.readouterr().out
    tokens = previewed(unset)["tokens"]
    assert said in capsys.readouterr().out
    assert (tokens["max_length"], tokens["too_long"], tokens["trained"]["p100"]) == (512, tokens["records"], 601)
