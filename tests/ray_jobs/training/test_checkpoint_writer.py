"""Checkpoints beside the steps, in a real rank with a real store. The judge is the order of steps and uploads."""

from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock

import pytest

from components.config import config_file
from components.config.schema import RunConfig
from components.store import folders
from components.store.store import Store
from ray_jobs.training import checkpoint, train_loop
from tests.models.tiny import colour_rows
from tests.models.train_group import in_group, train_in_rank

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
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}", "ray.num_workers=1"]
    changes = ["train.checkpoint_every_steps=2", "train.max_steps=11"]
    toml = config_file.dumps(config_file.loads(config_file.dumps(config), [*place, *changes]))
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
