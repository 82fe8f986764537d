"""The loop on real worker processes with gloo and DeepSpeed, without Ray. Losses are torch 2.13's on x86-64.

That every way of sharing the work out takes these same steps is shown by `test_matrix.py`. Here too: a training whose
workers hold the base dense, where memory allows, against the same one on its few bits; and a node that is slow to fetch
the base, which must not end the others, or that holds them up, and is named.
"""

import functools
import itertools
import math
import shutil
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes
import numpy as np
import pytest
import torch
import torch.distributed as dist

from components.config import config_file
from components.config.schema import RunConfig, TrainConfig
from components.shared.errors import ConfigError, StoreError
from components.store.store import Store
from ray_jobs.adapters import build
from ray_jobs.base import base_model
from ray_jobs.kernels import float32_layers
from ray_jobs.text import answer_loss, chat_format
from ray_jobs.text.batching import tokenize
from ray_jobs.training import checkpoint, step_zero, train_loop
from ray_jobs.training.train_loop import eval_steps, learning_rate_at, num_steps
from ray_jobs.training.zero import Worker
from tests.doubles.datasets import validate
from tests.models.bases import rewritten
from tests.models.plain import plain_training
from tests.models.spec import changed
from tests.models.tiny import colour_rows
from tests.models.train_group import Trained, fit_in_rank, in_group, in_turn, train_all, train_in_rank
from tests.ray_jobs.training.in_store import in_store

ROWS = colour_rows(256)
NOISE = 0.03  # what bfloat16 gradients, summed in another order, may move a loss by over these steps
# `make slow` takes ZeRO's stage 3, which shows most.
STAGES = [*(pytest.param(stage, marks=pytest.mark.full) for stage in (0, 2)), pytest.param(3, marks=pytest.mark.slow)]


@pytest.fixture
def run_all(config: RunConfig, store: Store, tmp_path: Path):
    """Train with some keys changed, by each name once, one after the other in the same processes."""

    def trained(
        *changes: str, names: tuple[str, ...], num_workers: int = 2, rows: list[dict[str, str]] = ROWS
    ) -> list[Trained]:
        toml = config_file.dumps(in_store(config, store, f"ray.num_workers={num_workers}", *changes))
        found = train_all(dict.fromkeys(names, toml), rows, tmp_path / names[0], num_workers=num_workers)
        return [found[name] for name in names]

    return trained


@pytest.fixture
def run(run_all):
    """Train with some keys changed; each call is a run of its own unless it names one."""
    names = itertools.count()

    def trained(*changes: str, run_id: str = "", **how: Any) -> Trained:
        (found,) = run_all(*changes, names=(run_id or f"run{next(names)}",), **how)
        return found

    return trained


@pytest.fixture
def lose(run, monkeypatch: pytest.MonkeyPatch):
    """Train until the group is lost after a step."""

    def lost(after: int, *changes: str, train=run, **how: Any) -> None:
        monkeypatch.setenv("STOP_AFTER_STEP", str(after))
        with pytest.raises(RuntimeError):
            train(*changes, **how)
        monkeypatch.delenv("STOP_AFTER_STEP")

    return lost


@functools.cache
def plain_losses(config_toml: str) -> list[float]:
    return plain_training(config_toml, ROWS).losses


def test_losses_are_those_of_a_plain_loop(run, config):
    found = run()
    assert len(found.losses) == 14
    np.testing.assert_allclose(found.losses, plain_losses(config_file.dumps(config)), atol=NOISE)
    # Values, so that a change of the numbers is seen even where it changes both.
    np.testing.assert_allclose(found.losses[:3], [6.4404, 6.2079, 5.0018], atol=NOISE)
    assert found.eval_losses[-1] < 0.5 * found.losses[0]


@pytest.mark.parametrize(
    ("changes", "num_workers"),
    [
        ("", 1),
        ("train.micro_batch_size=2", 2),
        # Of this data a step of two or of three rounds; the curve is of the plain mean over a batch's tokens.
        pytest.param("train.max_tokens=72 train.zero_stage=1", 2, marks=pytest.mark.full),
        pytest.param("train.max_tokens=72 train.zero_stage=3", 2, marks=pytest.mark.slow),
    ],
)
def test_how_a_batch_is_shared_out_does_not_change_the_steps(run, config, changes, num_workers):
    found = run(*changes.split(), num_workers=num_workers)
    np.testing.assert_allclose(found.losses, plain_losses(config_file.dumps(config)), atol=NOISE)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.full), 3])
def test_reading_once_what_records_begin_with_does_not_change_the_steps(run, config, stage):
    rows = [{**row, "prompt": f"What colour is it? {row['prompt']}"} for row in ROWS[:64]]
    chat = chat_format.load(base_model.resolve(config.model), config.model)
    split = tokenize([validate(row).record for row in rows[:8]], chat, config.model.max_length)
    assert answer_loss.pack(split, range(8)).packing.common > len("What colour is it? ")  # its tokens are bytes
    changes = [f"train.zero_stage={stage}", "train.gradient_checkpointing=true"]
    found = run(*changes, rows=rows)
    np.testing.assert_allclose(found.losses, plain_training(config_file.dumps(config), rows).losses, atol=NOISE)


@pytest.mark.slow
def test_measuring_in_between_does_not_change_an_nf4_training(run):
    # bitsandbytes would repack weights at the first measurement on CPU and lose the gradient from then on.
    often = run("method.name=qlora", "train.evals_per_epoch=14", "train.early_stopping_patience=0")
    never = run("method.name=qlora", "train.evals_per_epoch=0", "train.early_stopping_patience=0")
    assert often.losses == never.losses
    assert len(often.eval_losses) == 14


# What a checkpoint could forget: magnitudes, dropout's chance, a base of its own, and weights that are quantised,
# sharded or offloaded. The first in `make slow`; `frozen` resumes in `make test`.
RESUMED = [
    "method.name=dora method.dropout=0.1 train.zero_stage=3",
    "method.name=qdora method.dropout=0.1 train.max_tokens=72",
    "method.name=dvora method.base=nf4 train.zero_stage=3",
    "method.name=loftq method.scaling=rslora",
    "method.name=qlora train.optimizer=adamw_8bit train.zero_stage=3 train.cpu_offload=true",
    "method.name=vera method.base=int8 train.zero_stage=1 train.cpu_offload=true",
]


@pytest.mark.parametrize(
    "method",
    [pytest.param(each, marks=pytest.mark.full if number else pytest.mark.slow) for number, each in enumerate(RESUMED)],
)
def test_a_lost_group_resumes_to_the_very_weights_of_an_uninterrupted_one(run_all, lose, method):
    changes = [*method.split(), "train.checkpoint_every_steps=2", "train.max_steps=6"]
    lose(5, *changes, run_id="interrupted")
    whole, resumed = run_all(*changes, names=("whole", "interrupted"))
    assert resumed.resumed_from == 4
    assert resumed.losses == whole.losses[4:]
    assert resumed.weights.keys() == whole.weights.keys()
    assert all((resumed.weights[name] == whole.weights[name]).all() for name in whole.weights)


@pytest.mark.parametrize(
    "damaged",
    [
        "step-000004/rank-1/optimizer.safetensors",
        pytest.param("best-000004/best.safetensors", marks=pytest.mark.slow),
        pytest.param("step-000004/shared/state.json", marks=pytest.mark.slow),
    ],
)
def test_of_a_damaged_checkpoint_the_one_before_is_resumed_from(run_all, lose, store, damaged):
    changes = ["train.checkpoint_every_steps=2", "train.max_steps=6"]
    lose(5, *changes, run_id="interrupted")
    key = f"runs/interrupted/checkpoints/{damaged}"
    store.put(key, store.get(key)[:-1])
    whole, resumed = run_all(*changes, names=("whole", "interrupted"))
    assert resumed.resumed_from == 2
    assert resumed.losses == whole.losses[2:]
    assert all((resumed.weights[name] == whole.weights[name]).all() for name in whole.weights)


@pytest.mark.slow
def test_three_workers_of_a_batch_of_sixteen_take_the_steps_of_a_plain_loop(run, config):
    changes = ["train.micro_batch_size=1", "train.max_steps=6", "ray.num_workers=[1,4]"]  # in the last round one works
    found = run(*changes, num_workers=3)
    expected = plain_training(config_file.dumps(changed(config, *changes)), ROWS)
    np.testing.assert_allclose(found.losses, expected.losses, atol=NOISE)


SHAPES = [
    pytest.param("lora", [2, 1, 2], [2, 2, 0], "", id="2-1-2 workers, stages 2-2-0"),
    pytest.param("dora", [2, 2, 1], [2, 0, 3], "", marks=pytest.mark.slow, id="2-2-1 workers, stages 2-0-3"),
    pytest.param("lora", [1, 2, 2], [3, 1, 3], "train.max_tokens=72", marks=pytest.mark.full, id="micro-batches"),
    pytest.param(
        "lora train.optimizer=adamw_8bit", [2, 1, 2], [2, 3, 0], "", marks=pytest.mark.full, id="moments of 8 bits"
    ),
]


@pytest.mark.parametrize(("method", "num_workers", "stages", "last"), SHAPES)
def test_a_run_goes_on_with_other_workers_and_stages_and_takes_the_steps_of_a_plain_loop(
    run, lose, config, method, num_workers, stages, last
):
    changes = f"method.name={method} train.checkpoint_every_steps=2 train.max_steps=8 train.evals_per_epoch=0".split()
    for stop_after, count, stage in zip((3, 5), num_workers, stages, strict=False):
        lose(stop_after, *changes, f"train.zero_stage={stage}", run_id="moved", num_workers=count)
    shape = [f"train.zero_stage={stages[-1]}", *last.split()]
    resumed = run(*changes, *shape, run_id="moved", num_workers=num_workers[-1])
    assert resumed.resumed_from == 4  # where the second group was, which had gone on from the first one's step 2
    optimizer = bitsandbytes.optim.AdamW8bit if "8bit" in method else torch.optim.AdamW
    whole = plain_training(config_file.dumps(changed(config, *changes)), ROWS, optimizer=optimizer)
    np.testing.assert_allclose(resumed.losses, whole.losses[4:], atol=NOISE)
    np.testing.assert_allclose(resumed.grad_norms, whole.grad_norms[4:], rtol=0.1)


def train_while_the_store_is_away(
    config_toml: str, rows: list[dict[str, str]], until_step: int, patience_s: int
) -> dict[str, Trained]:
    """In each rank: rank 1 cannot reach the store up to a step; and then the same with the store there."""
    publish = checkpoint.folders.publish

    def refused(store: Store, key: str, *arguments: Any, **others: Any) -> Any:
        if dist.get_rank() == 1 and int(key.split("step-")[1][:6]) <= until_step:
            raise StoreError("the store cannot be reached")
        return publish(store, key, *arguments, **others)

    patience = mock.patch.object(checkpoint, "STORE_PATIENCE_S", patience_s)
    with patience, mock.patch.object(checkpoint.folders, "publish", refused):
        away = train_in_rank({"away": config_toml}, rows)
    return away | train_in_rank({"whole": config_toml}, rows)


@pytest.mark.parametrize("is_patient", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_store_that_is_away_for_one_worker_costs_checkpoints_and_no_training(config, store, tmp_path, is_patient):
    changes, patience_s = ["train.checkpoint_every_steps=2", "train.max_steps=8"], 1800 * is_patient
    toml = config_file.dumps(in_store(config, store, *changes))
    away = functools.partial(
        in_group, train_while_the_store_is_away, toml, ROWS, 4, patience_s, directory=tmp_path / "away", num_workers=2
    )
    if not is_patient:
        with pytest.raises(RuntimeError, match="the store cannot be reached"):
            away()
        return
    found, whole = away()[0].values()
    assert found.losses == whole.losses
    assert all((found.weights[name] == whole.weights[name]).all() for name in whole.weights)
    assert {each.key.split("/")[3] for each in store.list("runs/away/checkpoints/")} == {"best-000004", "step-000006"}
    assert checkpoint.complete(store, "away") == [6]


@pytest.mark.slow
def test_a_training_goes_on_in_the_dtype_that_it_began_with(run, lose, monkeypatch):
    changes = ["train.checkpoint_every_steps=2", "train.max_steps=4"]
    with monkeypatch.context() as slow:
        slow.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # what makes any x86-64 slow in bfloat16
        lose(3, *changes, run_id="moved")
    resumed = run(*changes, run_id="moved")
    assert resumed.resumed_from == 2
    assert resumed.matmul_dtype == "float32"


@pytest.mark.full
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_moments_of_8_bits_take_the_steps_of_bitsandbytes_own_optimizer(run, config, store, zero_stage):
    changes = ["train.optimizer=adamw_8bit", "train.checkpoint_every_steps=4", f"train.zero_stage={zero_stage}"]
    found = run(*changes, run_id="eight")
    whole = plain_training(config_file.dumps(config), ROWS, optimizer=bitsandbytes.optim.AdamW8bit)
    np.testing.assert_allclose(found.losses, whole.losses, atol=2 * NOISE)
    assert found.losses != run(f"train.zero_stage={zero_stage}").losses
    if zero_stage == 0:
        return  # without a partition each tensor has a state of its own, and these are too small for 8 bits
    (state,) = [o for o in store.list("runs/eight/checkpoints/step-000012/rank-0/") if "optimizer" in o.key]
    trained = sum(weight.size for weight in found.weights.values()) / 2
    assert state.size < 1.1 * trained * (4 + 2 * (1 + 4 / 256))


@pytest.mark.parametrize("zero_stage", STAGES)
def test_weight_decay_leaves_magnitudes_alone(run, config, zero_stage):
    # So strong that a magnitude's change would be a fraction of what it is.
    changes = ["method.name=dora", "train.weight_decay=30", "train.max_steps=6"]
    found = run(*changes, f"train.zero_stage={zero_stage}").weights
    expected = plain_training(config_file.dumps(changed(config, *changes)), ROWS)
    for name, change in expected.masters.items():
        if "magnitude" in name:
            layer = expected.model.get_submodule(name.partition(".lora_magnitude")[0])
            start = np.linalg.norm(layer.base_layer.weight.double().numpy(), axis=1)
            moved = change.double().numpy()
            assert np.linalg.norm(moved) > 1e-3 * np.linalg.norm(start)
            assert np.linalg.norm(found[name] - start - moved) < 0.1 * np.linalg.norm(moved), name
        elif "lora_A" in name:
            np.testing.assert_allclose(np.linalg.norm(found[name]), change.norm().item(), rtol=0.05)


@pytest.mark.parametrize("zero_stage", [STAGES[1], 3])
def test_early_stopping_keeps_the_best_weights(run, zero_stage):
    # A rate this high makes the loss rise after a while.
    changes = ["train.learning_rate=0.3", "train.evals_per_epoch=14", "train.early_stopping_patience=2"]
    found = run(*changes, "train.epochs=3", f"train.zero_stage={zero_stage}")
    assert found.stopped_early
    assert found.steps < 42
    assert min(found.eval_losses) not in found.eval_losses[-2:]


@pytest.mark.slow
def test_workers_with_unequal_shares_of_the_held_out_records_measure_the_same_loss(run):
    # Of 9 records one worker takes 5 in two rounds, and the other 4 in one: under ZeRO-3 neither could go on alone.
    rows = colour_rows(72)
    changes = ["train.micro_batch_size=4", "train.max_steps=1"]
    alone = run(*changes, num_workers=1, rows=rows)
    shared = run(*changes, "train.zero_stage=3", rows=rows)
    assert len(shared.eval_losses) == 1
    assert shared.eval_losses == pytest.approx(alone.eval_losses, abs=0.01)


def test_a_loss_that_is_no_number_stops_the_training_and_says_what_to_change(run, tiny_base, tmp_path):
    broken = shutil.copytree(tiny_base, tmp_path / "broken")
    with rewritten(broken) as weights:
        weights["model.norm.weight"][0] = float("nan")
    with pytest.raises(RuntimeError, match=r"the loss at step 0 is nan; lower train\.learning_rate"):
        run(f"model.base={broken}")


def test_a_checkpoint_of_another_config_is_refused(run, lose):
    alone = {"run_id": "mine", "num_workers": 1}
    lose(3, "train.checkpoint_every_steps=2", **alone)
    with pytest.raises(RuntimeError, match=f"{ConfigError.__name__}.*written with another config"):
        run("train.checkpoint_every_steps=2", "train.learning_rate=5e-3", **alone)


def train_with_magnitudes_held_whole(configs: dict[str, str]) -> None:
    """As far as a checkpoint of release 0.1.0 says."""

    def progress(*arguments: Any, magnitudes: str, **others: Any) -> checkpoint.TrainingProgress:
        return checkpoint.TrainingProgress(*arguments, **others)

    with mock.patch.object(train_loop, "TrainingProgress", progress):
        train_in_rank(configs, ROWS)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_a_checkpoint_that_holds_magnitudes_whole_is_refused_and_one_without_any_is_not(
    run, lose, config, store, tmp_path, method
):
    changes = ["train.checkpoint_every_steps=2", "train.max_steps=4", f"method.name={method}"]
    toml = config_file.dumps(in_store(config, store, "ray.num_workers=1", *changes))
    group = {"directory": tmp_path / "old", "num_workers": 1}
    lose(3, train=lambda: in_group(train_with_magnitudes_held_whole, {"old": toml}, **group))
    if method == "lora":
        assert run(*changes, run_id="old", num_workers=1).resumed_from == 2
        return
    with pytest.raises(RuntimeError, match=f"{ConfigError.__name__}.*trained magnitudes whole: start a new run"):
        run(*changes, run_id="old", num_workers=1)


@pytest.mark.parametrize("zero_stage", [STAGES[1], 3])
def test_a_checkpoint_holds_adapter_and_optimizer_and_never_the_base(run, store, zero_stage):
    settings = ["train.checkpoint_every_steps=4", "train.max_steps=5", f"train.zero_stage={zero_stage}"]
    weights = run(*settings, run_id="kept").weights
    objects = list(store.list("runs/kept/checkpoints/"))
    assert {o.key.split("/")[3] for o in objects} == {"best-000004", "step-000004"}
    trained = sum(weight.size for weight in weights.values())
    held = sum(o.size for o in objects)
    assert held < 1.3 * trained * (2 + 2 + 12)  # two copies in bfloat16; masters and two moments in float32


def test_the_rate_rises_then_falls_to_zero():
    rates = [learning_rate_at(step, peak=1.0, num_steps=100, warmup_share=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert all(math.isfinite(rate) for rate in rates)


@pytest.mark.parametrize(
    ("train_config", "records", "steps", "measured"),
    [
        (TrainConfig(batch_size=16), 160, 10, {3, 6, 9, 10}),
        (TrainConfig(batch_size=16), 161, 11, {3, 6, 9, 11}),
        (TrainConfig(batch_size=16, epochs=2, evals_per_epoch=1), 160, 20, {10, 20}),
        (TrainConfig(batch_size=16, epochs=2, max_steps=7, evals_per_epoch=0), 160, 7, {7}),
        (TrainConfig(batch_size=16), 3, 1, {1}),
    ],
)
def test_steps_and_measurements_follow_from_the_config(train_config, records, steps, measured):
    assert num_steps(train_config, records) == steps
    assert eval_steps(train_config, records) == measured


QUANTISED = bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt
STEPS = 4
A_BASE_LAYER = "base_model.model.model.layers.0.self_attn.q_proj.base_layer"


def train_and_save(config_toml: str, folder: str, dense_base: bool, free_bytes: int | None) -> dict[str, Any]:
    """Train with what the plan says and with so much free memory, and save the adapter as it is published."""
    config = config_file.loads(config_toml)
    free = float32_layers.available_bytes() if free_bytes is None else free_bytes
    with mock.patch.object(float32_layers, "available_bytes", return_value=free):
        fitted = fit_in_rank(config, colour_rows(80), run_id=Path(folder).name, dense_base=dense_base)
    if fitted.worker.rank == 0:
        build.save(fitted.adapted, Path(folder))
    return {
        "losses": [record["loss"] for record in fitted.records],
        "recipe": fitted.recipe,
        "is_quantised": any(isinstance(module, QUANTISED) for module in fitted.adapted.modules()),
        "dtype": fitted.adapted.get_submodule(A_BASE_LAYER).weight.dtype,
    }


@pytest.fixture
def trained(config: RunConfig, store, tmp_path):
    """Two workers' trainings, one after the other, each as the plan would have the base held: what rank 0 has, and the
    files of the adapter."""

    def run(*overrides: str, dense: tuple[bool, ...], free_bytes: int | None = None) -> list[dict[str, Any]]:
        steps, calls = [f"train.max_steps={STEPS}", "method.rank=4"], []
        for is_dense in dense:
            folder = tmp_path / ("dense" if is_dense else "stored")
            place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}/{folder.name}"]
            toml = config_file.dumps(changed(config, *place, *steps, *overrides))
            calls.append((toml, str(folder), is_dense, free_bytes))
        found = in_group(in_turn, train_and_save, calls, directory=tmp_path / "logs", num_workers=2)[0]
        return [
            {**each, "files": {path.name: path.read_bytes() for path in Path(folder).iterdir()}}
            for each, (_, folder, *_) in zip(found, calls, strict=True)
        ]

    return run


@pytest.mark.parametrize(
    ("adapter", "base", "dtype"),
    [
        ("lora", "int8", "float32"),
        ("dora", "nf4", "float32"),
        pytest.param("dora", "nf4", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_losses_and_what_is_published_are_the_same_to_the_bit(trained, adapter, base, dtype):
    method = [f"method.adapter={adapter}", f"method.base={base}", f"ray.cpu_matmul_dtype={dtype}"]
    stored, dense = trained(*method, dense=(False, True))
    assert (stored.pop("is_quantised"), dense.pop("is_quantised")) == (True, False)
    del stored["dtype"]  # of what bits are packed in
    assert dense.pop("dtype") == getattr(torch, dtype)
    assert len(stored["losses"]) > STEPS
    assert stored["losses"][0] != stored["losses"][STEPS - 1]
    assert dense == stored  # the recipe too, which the lineage has


@pytest.mark.slow
def test_a_worker_whose_memory_is_taken_by_others_reads_the_base_as_it_is_stored(trained):
    assert trained("method.base=nf4", dense=(True,), free_bytes=1000)[0]["is_quantised"]


STEP_S, FETCH_S = 15.0, 20.0


def fit_with_a_slow_node(config_toml: str, meeting: str) -> int:
    """Rank 1 fetches the base, and rank 0 reads it for the first check, longer than a collective may take."""
    rank, num_workers = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # until all have met: who leaves before that ends the others' meeting
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", timeout=timedelta(seconds=STEP_S), rank=rank, world_size=num_workers
    )
    resolve, probe, calls = base_model.resolve, step_zero.probe, []

    def slowly(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if rank == 1 and len(calls) == 2:  # the first is the test's own
            time.sleep(FETCH_S)
        return resolve(*given, **more)

    def reading(*given: Any) -> Any:
        if rank == 0:
            time.sleep(FETCH_S)
        return probe(*given)

    with mock.patch.object(base_model, "resolve", slowly), mock.patch.object(step_zero, "probe", reading):
        return fit_in_rank(config_file.loads(config_toml), colour_rows(32), run_id="slow").trained.progress.step


def test_workers_wait_for_the_one_that_fetches_the_base_last(config, store, tmp_path: Path):
    toml = config_file.dumps(in_store(config, store, "train.epochs=1"))
    steps = in_group(fit_with_a_slow_node, toml, str(tmp_path / "meeting"), directory=tmp_path, num_workers=2)
    assert steps[0] == steps[1] > 0


@pytest.mark.parametrize(
    ("seconds", "rank"),
    [
        ([10.0, 10.0], None),
        ([10.0, 12.0], None),
        ([10.0, 13.0], 1),
        ([13.0, 10.0, 10.2, 9.9], 0),
        ([10.0, 30.0, 30.0, 10.0, 10.0], 1),  # two: one of them is named
        ([10.0, 5.0, 10.0], None),  # who is fast holds up nobody
    ],
)
def test_the_straggler_is_who_is_slower_than_most(seconds, rank):
    assert train_loop.straggler(seconds) == rank


def paced(zero_stage: int) -> None:
    """In each rank: rank 1's clock runs twice as fast."""
    rank = dist.get_rank()
    ticks = itertools.count(0.0, 1.0 + rank)
    with mock.patch.object(train_loop, "time", SimpleNamespace(perf_counter=lambda: next(ticks))):
        pace = train_loop.Pace(Worker(rank, 2, torch.device("cpu")), zero_stage=zero_stage)
        for step in range(1, 2 * train_loop.EVERY_STEPS + 1):
            with pace.forward():
                pass
            pace.compare(step)


@pytest.mark.parametrize(("zero_stage", "times"), [(2, 1), (3, 0)])
def test_a_straggler_is_named_once_where_workers_compute_by_themselves(tmp_path: Path, zero_stage: int, times: int):
    in_group(paced, zero_stage, directory=tmp_path, num_workers=2)
    said = (tmp_path / "rank-0.log").read_text()
    assert said.count("holds up the others: its forward passes took 100.0 s and theirs 50.0 s") == times
    assert said.count("worker 1 on ") == times
