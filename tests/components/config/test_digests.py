"""What makes two trainings take the same steps."""

import pytest

from components.config import config_file

GOOD = """
[adapter]
name = "sums"
[model]
base = "org/name"
[data]
source = "rows.jsonl"
"""


@pytest.mark.parametrize(
    "change",
    [
        "ray.num_workers=2",
        "ray.cluster.kind=rayjob",
        "ray.max_failures=9",
        "train.zero_stage=3",
        "train.max_tokens=512",
    ],
)
def test_how_a_training_is_shared_out_is_no_part_of_what_it_computes(change: str) -> None:
    assert config_file.loads(GOOD, [change]).digest != config_file.loads(GOOD).digest
    assert config_file.loads(GOOD, [change]).training_digest == config_file.loads(GOOD).training_digest


@pytest.mark.parametrize(
    "change",
    [
        "train.batch_size=32",
        "train.seed=1",
        "train.optimizer=adamw_8bit",
        "ray.cpu_matmul_dtype=float32",
        "method.rank=4",
    ],
)
def test_what_a_training_computes_is_in_its_digest(change: str) -> None:
    assert config_file.loads(GOOD, [change]).training_digest != config_file.loads(GOOD).training_digest
