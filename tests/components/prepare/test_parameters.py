import inspect

import pytest

from components.prepare.component import prepare
from components.prepare.parameters import KEYS, overrides
from components.shared import config_file

CONFIG = """
[adapter]
name = "a"
[model]
base = "org/model"
[data]
source = "x"
min_new_records = 7
"""
NOTHING = {"adapter_name": "", "data_source": "", "method_name": "", "learning_rate": 0.0, "num_workers": 0}


def test_what_is_left_empty_changes_nothing() -> None:
    assert overrides(**NOTHING) == []


def test_each_parameter_replaces_its_key() -> None:
    given = {
        "adapter_name": "icd",
        "data_source": 's3://b/it\'s "new"/',
        "method_name": "dora",
        "learning_rate": 3e-4,
        "num_workers": 2,
    }
    config = config_file.loads(CONFIG, overrides(**given, train_without_new_data=True))
    assert config.adapter.name == "icd"
    assert config.data.source == given["data_source"]
    assert config.method.name == "dora"
    assert config.train.learning_rate == 3e-4
    assert config.ray.num_workers == 2
    assert config.data.min_new_records == 0


@pytest.mark.parametrize("name", KEYS)
def test_each_parameter_is_one_of_the_step(name: str) -> None:
    assert name in inspect.signature(prepare.python_func).parameters
