"""A number of workers that may change: two numbers of the config, which nothing that is computed depends on."""

import pytest

from components.config import config_file
from components.config.schema import RunConfig
from components.shared.errors import ConfigError

TOML = """
[adapter]
name = "icd"
[model]
base = "org/model"
[data]
source = "rows.jsonl"
[train]
batch_size = 16
micro_batch_size = 4
"""


def with_workers(number: str) -> RunConfig:
    return config_file.loads(TOML, [f"ray.num_workers={number}"])


def test_elastic_workers_are_two_numbers_which_no_training_depends_on() -> None:
    fixed, elastic = with_workers("1"), with_workers("[1, 4]")
    assert (elastic.ray.min_workers, elastic.ray.max_workers, elastic.ray.is_elastic) == (1, 4, True)
    assert (fixed.ray.min_workers, fixed.ray.max_workers, fixed.ray.is_elastic) == (1, 1, False)
    assert elastic.training_digest == fixed.training_digest
    assert elastic.on(1).digest == fixed.digest
    assert config_file.loads(config_file.dumps(elastic)) == elastic


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("0", "ray.num_workers = 0: expected an integer, at least 1, or two of them"),
        ("[1]", "ray.num_workers = [1]: expected an integer"),
        ("[4, 2]", "put the smaller number first"),
        ("[1, 3]", "train.batch_size 16 is not a multiple of train.micro_batch_size 4 x ray.num_workers 3"),
    ],
)
def test_what_is_no_number_of_workers_is_refused(number: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        with_workers(number)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
