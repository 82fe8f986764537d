"""Every legal cell of method x base x ZeRO stage x offload x checkpointing, trained by two real ranks on a tiny base.

Cells that differ in nothing but how the work is shared out must take the same steps, which are those of a plain loop.
"""

import functools
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.config import config_file
from components.config.methods import Cell, key_of, refusals
from components.config.schema import RunConfig
from pipelines.local import seaweedfs
from tests.components.config.cells import AXES
from tests.models.plain import Curve, plain_training
from tests.models.tiny import colour_rows
from tests.models.train_group import Trained, train_all
from tests.ray_jobs.conftest import CONFIG

CELLS = [cell for values in product(*AXES.values()) if not list(refusals(cell := Cell(*values)))]
NOISE = 0.03  # what bfloat16 gradients, summed in another order, may move a loss by over these steps
NORM_NOISE = 0.05  # the same for the gradient's norm, as a share of it
WEIGHT_NOISE = 0.1  # and a trained weight: Adam's first steps are of full length, whichever way noise may point
ROWS = colour_rows(36)  # 31 to train on in two steps, and 5 held out: an uneven share for two ranks
SETTINGS = ["method.rank=8", 'method.target_modules=["q_proj", "down_proj"]', "train.micro_batch_size=4"]
SETTINGS += ["train.evals_per_epoch=0", "train.early_stopping_patience=0", "ray.cpu_matmul_dtype=bfloat16"]
IN_FLOAT32 = "in float32, ZeRO stage {}"


def name_of(cell: Cell) -> str:
    shown = [str(getattr(cell, field)) for field in ("adapter", "scaling", "init", "base")]
    shown += [f"zero{cell.zero_stage}"] + ["offload"] * cell.cpu_offload
    return "-".join(shown + ["checkpointing"] * cell.gradient_checkpointing)


def reference_of(cell: Cell) -> Cell:
    """The same method on the same base, with nothing shared out, offloaded or recomputed."""
    return replace(cell, zero_stage=0, cpu_offload=False, gradient_checkpointing=False)


def in_float32(reference: Cell) -> list[Cell]:
    """The cells of a method that are also trained with products in float32: unshared, and with a sharded base."""
    sharded = replace(reference, zero_stage=3, gradient_checkpointing=True)
    return [reference, *([sharded] if sharded in CELLS else [])]


REFERENCES = sorted({reference_of(cell) for cell in CELLS}, key=name_of)
# Rows that have each adapter, scaling, start and base at least once: unshared, and with everything shared out. `make
# slow` trains the other stages of some of them and QLoRA as most take it, and `make full` all.
FIRST = {
    "dora-classic-default-bf16-zero0",
    "dvora-classic-default-nf4-zero0",
    "lora-rslora-loftq-nf4-zero0",
    "vera-classic-default-int8-zero0",
}
LONG = {"dora-classic-default-bf16-zero0", "lora-classic-default-nf4-zero0"}


def tier(cell: Cell) -> str:
    """The marker of a cell; empty for those of `make test`. Activations are recomputed in half of them."""
    row = name_of(reference_of(cell))
    has_its_turn = cell.zero_stage > 0 and cell.gradient_checkpointing == (
        (cell.zero_stage + cell.cpu_offload) % 2 == 1
    )
    is_unshared = cell == reference_of(cell)
    if row in FIRST and (is_unshared or (has_its_turn and cell.zero_stage == 3)):
        return ""
    return "slow" if row in LONG and (is_unshared or has_its_turn) else "full"


def in_turn(cells: list[Cell]) -> list[Any]:
    """The cells as parameters, each marked with its tier."""
    marks = {cell: [getattr(pytest.mark, name)] if (name := tier(cell)) else [] for cell in cells}
    return [pytest.param(cell, marks=marks[cell], id=name_of(cell)) for cell in cells]


class Matrix:
    """Trains the cells of one reference and tier together, when one of them is asked for."""

    def __init__(self, config: RunConfig, directory: Path) -> None:
        self._config = config_file.dumps(config)
        self._directory = directory
        self._row = functools.cache(self._train)
        self.plain = functools.cache(self._plain)

    def of(self, cell: Cell) -> dict[str, Trained]:
        """What was trained together with a cell, by name."""
        return self._row(reference_of(cell), tier(cell))

    def _train(self, reference: Cell, marker: str) -> dict[str, Trained]:
        cells = [cell for cell in CELLS if reference_of(cell) == reference and tier(cell) == marker]
        configs = {name_of(cell): self._toml(cell) for cell in [reference, *cells]}
        if reference in cells:
            for cell in in_float32(reference):
                configs[IN_FLOAT32.format(cell.zero_stage)] = self._toml(cell, "ray.cpu_matmul_dtype=float32")
        directory = self._directory / f"{name_of(reference)}-{marker}"
        return train_all(configs, ROWS, directory, num_workers=2)

    def _plain(self, reference: Cell) -> Curve:
        return plain_training(self._toml(reference), ROWS)

    def _toml(self, cell: Cell, *changes: str) -> str:
        spelled = [f"{key_of(field.name)}={str(getattr(cell, field.name)).lower()}" for field in fields(cell)]
        return config_file.dumps(config_file.loads(self._config, [*spelled, *changes]))


@pytest.fixture(scope="module")
def matrix(
    tiny_base: Path, s3_server: seaweedfs.Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Matrix]:
    place = [f"registry.bucket={s3_server.bucket}", "registry.prefix=tests/matrix"]
    config = config_file.loads(CONFIG.format(base=tiny_base), [*SETTINGS, *place])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FINELOOP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Matrix(config, tmp_path_factory.mktemp("matrix"))


def assert_same_curve(found: Trained, expected: Trained | Curve) -> None:
    np.testing.assert_allclose(found.losses, expected.losses, atol=NOISE)
    np.testing.assert_allclose(found.grad_norms, expected.grad_norms, rtol=NORM_NOISE)


def test_the_first_rows_have_every_value_of_a_method():
    found = [reference for reference in REFERENCES if name_of(reference) in FIRST]
    assert len(found) == len(FIRST)
    for axis in ("adapter", "scaling", "init", "base"):
        assert {getattr(cell, axis) for cell in found} == {getattr(cell, axis) for cell in REFERENCES}


@pytest.mark.parametrize("cell", in_turn(CELLS))
def test_a_legal_cell_takes_the_steps_of_its_method_unshared(cell: Cell, matrix: Matrix):
    row = matrix.of(cell)
    found, expected = row[name_of(cell)], row[name_of(reference_of(cell))]
    assert_same_curve(found, expected)
    np.testing.assert_allclose(found.eval_losses, expected.eval_losses, atol=NOISE)
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert np.linalg.norm(found.weights[name] - weight) <= WEIGHT_NOISE * np.linalg.norm(weight), name


@pytest.mark.parametrize("reference", in_turn(REFERENCES))
def test_a_method_takes_the_steps_of_a_plain_loop(reference: Cell, matrix: Matrix):
    found = matrix.of(reference)[name_of(reference)]
    assert len(found.losses) == 2
    assert_same_curve(found, matrix.plain(reference))


@pytest.mark.parametrize("reference", in_turn(REFERENCES))
def test_with_products_in_float32_a_method_takes_those_steps_too(reference: Cell, matrix: Matrix):
    for cell in in_float32(reference):
        found = matrix.of(reference)[IN_FLOAT32.format(cell.zero_stage)]
        assert found.matmul_dtype == "float32"
        assert_same_curve(found, matrix.plain(reference))
