"""Checkpoints: written beside the steps, dealt out to other workers, and a store that is away for a while."""

from concurrent.futures import Future
from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock

import bitsandbytes
import pytest
import torch

from components.config import config_file
from components.config.schema import RunConfig
from components.shared.errors import IntegrityError, StoreError
from components.store import folders
from components.store.store import Store
from ray_jobs.training import checkpoint, train_loop, zero
from ray_jobs.training.checkpoint import Part, Piece, deal, patiently
from tests.models.tiny import colour_rows
from tests.models.train_group import in_group, train_in_rank
from tests.ray_jobs.training.in_store import in_store

WHOLE = {"a": torch.arange(0.0, 10), "b": torch.arange(10.0, 17), "c": torch.arange(17.0, 29)}
PADDING = 2
LEARNING_RATE = 0.01


def cut_flat(num_workers: int) -> list[Part]:
    """One parameter after the other, then cut, as ZeRO 1 and 2 do."""
    flat = torch.cat([*WHOLE.values(), torch.full([PADDING], -1.0)])
    flat = torch.cat([flat, torch.full([-len(flat) % num_workers], -1.0)])
    most = len(flat) // num_workers
    parts = []
    for rank in range(num_workers):
        pieces, start = [], 0
        for name, values in WHOLE.items():
            first, last = max(start, rank * most), min(start + len(values), (rank + 1) * most)
            if first < last:
                pieces.append(Piece(name, first - start, last - first, 0, first - rank * most))
            start += len(values)
        state = {"step": torch.tensor(7.0), "master": flat[rank * most : (rank + 1) * most]}
        parts.append(Part(pieces, [state]))
    return parts


def cut_each(num_workers: int) -> list[Part]:
    """Each parameter by itself, as ZeRO 3 does."""
    parts = []
    for rank in range(num_workers):
        pieces, held = [], []
        for name, values in WHOLE.items():
            most = -(-len(values) // num_workers)
            mine = values[rank * most : (rank + 1) * most]
            pieces.append(Piece(name, rank * most, len(mine), 0, sum(map(len, held))))
            held += [mine, torch.full([most - len(mine)], -1.0)]
        parts.append(Part(pieces, [{"step": torch.tensor(7.0), "master": torch.cat(held)}]))
    return parts


def cut_nothing(num_workers: int) -> list[Part]:
    """Each parameter whole on every worker, in a partition of its own."""
    pieces = [Piece(name, 0, len(values), number, 0) for number, (name, values) in enumerate(WHOLE.items())]
    states = [{"step": torch.tensor(7.0), "master": values} for values in WHOLE.values()]
    return [Part(pieces, states)] * num_workers


WAYS = [(cut, count) for cut in (cut_flat, cut_each, cut_nothing) for count in (1, 2, 3, 5)]


@pytest.mark.parametrize(("found", "found_workers"), WAYS)
@pytest.mark.parametrize(("wanted", "wanted_workers"), WAYS)
def test_state_that_is_dealt_out_anew_is_that_of_workers_who_always_held_it(
    found, found_workers, wanted, wanted_workers
):
    for expected in wanted(wanted_workers):
        sizes = [len(state["master"]) for state in expected.states]
        states = deal(found(found_workers), expected.pieces, sizes)
        for state, other in zip(states, expected.states, strict=True):
            torch.testing.assert_close(state["master"], other["master"].clamp(min=0))
            assert state["step"] == 7


@pytest.mark.parametrize(
    ("stored", "apart"), [(zero.saved, 0.0), (lambda state: zero.in_float32(zero.saved(state)), LEARNING_RATE / 50)]
)
def test_moments_of_8_bits_come_back_where_an_optimizer_has_its_weights_in_steps_alone(stored, apart):
    """As at stage 3; in 8 bits, or as they are dealt out to other workers."""
    torch.manual_seed(0)
    gradients = torch.randn(6, 20 * zero.BLOCK)
    masters = [torch.nn.Parameter(torch.ones(gradients.shape[1])) for _ in range(2)]
    whole, resumed = (bitsandbytes.optim.AdamW8bit([master], lr=LEARNING_RATE) for master in masters)
    for gradient in gradients[:3]:
        masters[0].grad = gradient
        whole.step()
    (group,) = resumed.param_groups
    group["params"] = []
    masters[1].data.copy_(masters[0])
    zero.restore(resumed, masters[1], stored(whole.state[masters[0]]))
    assert group["params"] == []
    group["params"] = [masters[1]]
    assert resumed.state[masters[1]]["state1"].dtype is torch.uint8
    for gradient in gradients[3:]:
        for master, optimizer in zip(masters, (whole, resumed), strict=True):
            master.grad = gradient
            optimizer.step()
    assert (masters[1] - masters[0]).abs().mean() <= apart


def test_a_part_that_is_missing_is_noticed():
    (alone,) = cut_flat(1)
    with pytest.raises(IntegrityError, match="lack 16 of the optimizer's elements"):
        deal(cut_flat(2)[1:], alone.pieces, [31])


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Time that only sleeping passes."""
    passed = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: passed[0])
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: passed.__setitem__(0, passed[0] + seconds))
    return passed


def test_what_a_store_refuses_is_tried_again_until_it_is_there(clock, caplog):
    act = mock.Mock(side_effect=[StoreError("503"), StoreError("503"), "done"])
    assert patiently(60, act, "waiting to publish") == "done"
    assert clock == [20.0]
    assert "waiting to publish, for another 50 s at most" in caplog.text


def test_after_its_time_the_store_s_own_words_end_it(clock):
    with pytest.raises(StoreError, match="503"):
        patiently(60, mock.Mock(side_effect=StoreError("503")), "waiting")
    assert clock == [60.0]


def test_what_is_wrong_in_the_store_is_not_tried_again(clock):
    with pytest.raises(IntegrityError):
        patiently(60, mock.Mock(side_effect=IntegrityError("damaged")), "waiting")
    assert clock == [0.0]


def test_a_checkpoint_that_the_store_does_not_take_is_told_and_after_its_time_the_training_ends(clock, store, caplog):
    writer = checkpoint.CheckpointWriter(store, mock.Mock(run_id="r"), rank=0)
    refused: Future[None] = Future()
    refused.set_exception(StoreError("503"))
    writer._writing = 4, refused
    assert not writer.finish()
    assert "training goes on without a checkpoint of step 4" in caplog.text
    assert writer.finish()  # nothing is being written
    clock[0] += checkpoint.STORE_PATIENCE_S
    writer._writing = 6, refused
    with pytest.raises(StoreError, match="503"):
        writer.finish()


NEVER_S = 30.0
"""How long an upload waits for a step that never comes where uploads hold steps up."""


def uploads(config_toml: str) -> list[tuple[str, int]]:
    """What was uploaded after how many steps; each checkpoint's first upload waits for the step after it."""
    steps: list[Event] = [Event() for _ in range(20)]
    found: list[tuple[str, int]] = []
    publish, take_step = folders.publish, train_loop.take_step

    def waiting(store: Store, key: str, *arguments: Any, **others: Any) -> Any:
        folder = key.partition("checkpoints/")[2]
        if folder.endswith("rank-0"):
            steps[int(folder[5:11]) + 1].wait(NEVER_S)
        found.append((folder, sum(step.is_set() for step in steps)))
        return publish(store, key, *arguments, **others)

    def counting(*arguments: Any, step: int, **others: Any) -> Any:
        result = take_step(*arguments, step=step, **others)
        steps[step + 1].set()
        return result

    with mock.patch.object(folders, "publish", waiting), mock.patch.object(train_loop, "take_step", counting):
        train_in_rank({"beside": config_toml}, colour_rows(256))
    return found


@pytest.mark.slow
def test_steps_go_on_while_a_checkpoint_is_written_and_best_weights_are_written_once(
    config: RunConfig, store: Store, tmp_path: Path
):
    changes = ["ray.num_workers=1", "train.checkpoint_every_steps=2", "train.max_steps=11"]
    toml = config_file.dumps(in_store(config, store, *changes))
    (found,) = in_group(uploads, toml, directory=tmp_path, num_workers=1)
    assert [folder for folder, _ in found] == [
        *["step-000002/rank-0", "step-000002/shared"],
        *["step-000004/rank-0", "best-000004", "step-000004/shared"],
        *["step-000006/rank-0", "step-000006/shared"],
        *["step-000008/rank-0", "best-000008", "step-000008/shared"],
        *["step-000010/rank-0", "step-000010/shared"],
    ]
    assert all(after > int(folder[5:11]) for folder, after in found)
    kept = {item.key.split("/")[3] for item in store.list("runs/beside/checkpoints/")}
    assert kept == {"best-000008", "step-000008", "step-000010"}
    assert checkpoint.complete(store, "beside") == [10, 8]


def test_what_another_worker_is_writing_by_now_is_not_deleted_with_what_is_old(store: Store):
    """Only rank 0 deletes, and no other one waits for it: their parts of the next checkpoint may be there already."""
    for folder in ("1/shared", "1/rank-1", "2/rank-1", "3/shared", "3/rank-0", "3/rank-1", "4/rank-1"):
        step, _, part = folder.partition("/")
        folders.publish(store, f"{checkpoint.key_of('run', int(step))}/{part}", {checkpoint.STATE: b"{}"})
    checkpoint.keep_newest(store, "run", 1)
    left = {item.key.removeprefix("runs/run/checkpoints/step-00000").rpartition("/")[0] for item in store.list("runs/")}
    assert left == {"3/shared", "3/rank-0", "3/rank-1", "4/rank-1"}
