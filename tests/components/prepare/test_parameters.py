import inspect
import re
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from components.config import config_file
from components.prepare.component import prepare
from components.prepare.prepare import KEYS, overrides
from components.shared.errors import ConfigError, FineloopError
from components.store.store import Store

CONFIG = """
[adapter]
name = "a"
[model]
base = "org/model"
[data]
source = "x"
min_new_records = 7
"""
NOTHING = {
    **dict.fromkeys(("adapter_name", "base_model", "data_source", "method_name"), ""),
    **dict.fromkeys(("rank", "epochs", "num_workers"), 0),
    "learning_rate": 0.0,
}


def test_each_parameter_replaces_its_key() -> None:
    given = {
        **{"adapter_name": "icd", "base_model": "org/other", "data_source": 's3://b/it\'s "new"/'},
        **{"method_name": "dora", "rank": 8, "epochs": 3, "learning_rate": 3e-4, "num_workers": 2},
    }
    assert given.keys() == KEYS.keys() <= inspect.signature(prepare.python_func).parameters.keys()
    assert overrides(**NOTHING) == {}
    changes = overrides(**given, train_without_new_data=True)
    assert changes.keys() == {*given, "train_without_new_data"}
    config = config_file.loads(CONFIG, [*changes.values()])
    assert config.adapter.name == "icd"
    assert config.data.source == given["data_source"]
    assert config.model.base == "org/other"
    assert (config.method.name, config.method.rank, config.train.epochs) == ("dora", 8, 3)
    assert config.train.learning_rate == 3e-4
    assert config.ray.num_workers == 2
    assert config.data.min_new_records == 0


@pytest.fixture
def filled_in(store: Store) -> Callable[..., Any]:
    """Run the step as the form of the Kubeflow UI was filled in."""
    registry = f'[registry]\nbucket = "{store.bucket}"\nprefix = "{store.prefix}"\n'

    def run(config: str = CONFIG, **fields: Any) -> Any:
        form = {**NOTHING, "run_id": "", "job_id": "3f2a", "train_without_new_data": False, **fields}
        return prepare.python_func(config=tomllib.loads(config + registry), **form)

    return run


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method_name": "lora2", "learning_rate": 0.1}, "run parameter method_name: method.name = 'lora2': "),
        ({"num_workers": 3, "adapter_name": "b"}, "run parameter num_workers: train.batch_size"),
        ({"num_workers": -1, "learning_rate": 5.0}, "run parameter learning_rate, num_workers:\n  train.learning_"),
        ({"data_source": "/none/rows.jsonl"}, "run parameter data_source: data.source is '/none/rows.jsonl', which "),
        ({"data_source": "s3://nobodys-bucket/a/"}, "run parameter data_source: "),
        ({"run_id": "a b"}, "run_id 'a b': takes "),
    ],
)
def test_a_wrong_value_is_told_by_its_field_of_the_form(filled_in, store: Store, fields, message: str) -> None:
    with pytest.raises(FineloopError, match=f"^{re.escape(message)}") as caught:
        filled_in(**fields)
    assert "--set" not in str(caught.value)
    if "data_source" in fields:
        assert store.get_json("runs/3f2a/steps/prepare.json")["result"]["error"]["message"] == str(caught.value)


def test_what_is_wrong_in_the_forms_config_is_told_of_the_config(filled_in: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"^run parameter config: unknown key data\.min_new_record:"):
        filled_in(CONFIG.replace("records", "record"), learning_rate=0.1)
