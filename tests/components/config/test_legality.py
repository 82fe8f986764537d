"""What may be combined, and what a person reads whose combination may not."""

from dataclasses import fields
from itertools import product

import pytest

from components.config.methods import FIELDS, METHODS, Cell, nearest_legal, refusals
from components.config.schema import RunConfig
from tests.components.config.cells import AXES
from tests.components.config.loading import message_of, set_in


def test_every_cell_is_legal_or_has_a_legal_one_near() -> None:
    for values in product(*AXES.values()):
        cell = Cell(*values)
        near = nearest_legal(cell)
        assert not list(refusals(near)), cell
        assert bool(list(refusals(cell))) == (near != cell), cell


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_legal_by_its_name_alone(name: str) -> None:
    row = set_in(f"method.name={name}").method.row
    assert row == METHODS[name]  # type: ignore[comparison-overlap]


def test_axes_spell_what_has_no_name() -> None:
    config = set_in("method.name=dora", "method.scaling=rslora", "method.base=int8")
    assert (config.method.row.adapter, config.method.row.scaling, config.method.row.base) == ("dora", "rslora", "int8")


def test_rank_rate_and_alpha_are_the_methods_own_until_set() -> None:
    lora, vera = set_in("method.name=lora"), set_in("method.name=vera")
    assert (lora.method.r, lora.method.lora_alpha, vera.method.r) == (16, 32.0, 256)
    assert lora.learning_rate == pytest.approx(2e-4)
    assert vera.learning_rate > lora.learning_rate
    assert set_in("method.name=vera", "train.learning_rate=0.5", "method.rank=8").learning_rate == 0.5


@pytest.mark.parametrize(
    ("overrides", "reason", "near"),
    [
        (["method.base=int8", "train.zero_stage=3"], "bitsandbytes#1451", "Nearest to it: train.zero_stage=2"),
        (["method.name=loftq", "method.base=bf16"], "this base is not NF4", "Nearest to it: method.base=nf4"),
        (["method.name=vera", "method.scaling=rslora"], "no alpha to scale", "method.scaling=classic"),
        (["train.cpu_offload=true", "train.zero_stage=0"], "no partition", "train.zero_stage=1"),
        (["method.name=dora", "method.init=loftq"], "this adapter has others", "method.init=default"),
        (["method.name=vera", "method.alpha=8"], "method.alpha 8 scales nothing in vera", "remove it"),
    ],
)
def test_an_illegal_cell_is_refused_with_its_reason_and_the_nearest_legal_one(
    overrides: list[str], reason: str, near: str
) -> None:
    message = message_of(*overrides)
    assert reason in message
    assert near in message


def test_the_fields_named_to_a_person_are_the_config_s_own() -> None:
    assert set(FIELDS) == {field.name for field in fields(Cell)}
    for path in FIELDS.values():
        section, _, key = path.partition(".")
        assert key in RunConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
