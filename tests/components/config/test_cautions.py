"""Settings that are allowed and hardly ever meant."""

import json

import pytest

from components.config import config_file
from components.config.methods import METHODS
from components.config.schema import cautions
from components.config.section import REMOVED

CONFIG = """
[adapter]
name = "colours"
[model]
base = "base"
[data]
source = "unused.jsonl"
[train]
batch_size = 4
micro_batch_size = 4
[ray]
num_workers = 1
[method]
name = "lora"
"""


def said(*changes: str, num_steps: int | None = None) -> list[str]:
    return list(cautions(config_file.loads(CONFIG, changes), num_steps))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.learning_rate=0.9"], "train.learning_rate 0.9 is 4.5e+03 times the 0.0002 of lora at rank 16"),
        (["train.learning_rate=0.03"], "train.learning_rate 0.03 is 150 times the 0.0002 of lora"),
        (
            ["method.name=vera", "train.learning_rate=2e-5"],
            "train.learning_rate 2e-05 is a 300th of the 0.006 of vera at rank 256",
        ),
        (["method.rank=4", "method.alpha=10000"], "method.alpha 10000 is 1.25e+03 times the 8 of lora at rank 4"),
        (["method.rank=256", "method.alpha=0.01"], "method.alpha 0.01 is a 5.12e+04th of the 512 of lora at rank 256"),
    ],
)
def test_a_setting_that_is_far_from_any_in_use_is_named(changes, message):
    (line,) = said(*changes)
    assert line.startswith(message)


def test_few_steps_are_said():
    assert said(num_steps=7) == [
        "7 optimizer steps are few: raise train.epochs, lower train.batch_size (now 4) and train.micro_batch_size, or "
        "add data"
    ]
    assert not said(num_steps=200)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_said_of_what_methods_set_themselves_and_of_what_sweeps_try(name):
    own = METHODS[name].learning_rate
    for rate in (own / 10, own, own * 10):
        assert not said(f"method.name={name}", f"train.learning_rate={rate:.12f}")


@pytest.mark.parametrize("path", [*REMOVED])
def test_a_removed_key_is_read_and_said_to_be_gone_and_moves_no_digest(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, removed = config_file.loads(CONFIG), REMOVED[path]
    for value in [each for each in (removed.default, 7) if each is not None]:
        caplog.clear()
        found = config_file.loads(CONFIG, [f"{path}={json.dumps(value)}"])
        assert (found, found.digest, found.training_digest) == (plain, plain.digest, plain.training_digest)
        assert (path in caplog.text and removed.instead in caplog.text) is (value == 7)


def test_an_old_key_is_read_and_said_to_be_old(caplog: pytest.LogCaptureFixture) -> None:
    found = config_file.loads(CONFIG, ["ray.cluster.kind=rayjob", "ray.cluster.spot=true"])
    assert len(found.ray.cluster.worker_template["spec"]["tolerations"]) == 3
    assert "ray.cluster.spot: read for this release only" in caplog.text
    caplog.clear()
    config_file.loads(config_file.dumps(config_file.loads(CONFIG, ["ray.cluster.kind=rayjob"])))
    assert not caplog.text
