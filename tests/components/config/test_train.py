"""Which keys of the section [train] go together, and with which workers."""

import re

import pytest

from components.shared.errors import ConfigError
from tests.components.config.loading import message_of, set_in


def test_an_optimizer_that_pages_gpu_memory_needs_a_gpu_and_a_state_that_lies_on_it():
    on_a_gpu = ["ray.use_gpu=true", "train.optimizer=paged_adamw_8bit"]
    assert set_in(*on_a_gpu).train.optimizer == "paged_adamw_8bit"
    for changes in (on_a_gpu[1:], [*on_a_gpu, "train.cpu_offload=true"]):
        with pytest.raises(ConfigError, match=r"Nearest to it: train\.optimizer=adamw_8bit"):
            set_in(*changes)
    assert set_in("train.optimizer=adamw_8bit", "train.cpu_offload=true").train.optimizer == "adamw_8bit"


@pytest.mark.parametrize("where", ["ray.use_gpu=true", "train.zero_stage=3"])
def test_a_dense_base_is_for_cpu_workers_that_hold_it_whole(where: str) -> None:
    assert set_in("train.dense_base=true").train.dense_base
    assert re.search(
        r"train\.dense_base is for CPU workers.*remove train\.dense_base", message_of("train.dense_base=true", where)
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ray.use_gpu=true"], "set train.gradient_checkpointing=true, or remove train.activation_offloading"),
        (["train.gradient_checkpointing=true"], "where they lie without ray.use_gpu: remove train.activation_off"),
    ],
)
def test_activations_that_leave_a_gpu_are_those_that_checkpointing_keeps_there(overrides: list[str], message: str):
    offloading = "train.activation_offloading=true"
    assert message in message_of(offloading, *overrides)
    assert set_in(offloading, "train.gradient_checkpointing=true", "ray.use_gpu=true").train.activation_offloading
