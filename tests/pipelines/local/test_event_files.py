"""Event files beside a run; they are read back as TFRecords by hand, and their events as TensorBoard's own messages."""

import json
import struct
from pathlib import Path

import pytest

from components.records import runs
from components.store.store import Store
from pipelines.local.run import event_files_beside
from tests.waiting import wait_until


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    from tensorboardX.proto.event_pb2 import Event  # once the code under test has imported the package

    (file,) = folder.glob("tensorboard/events.out.tfevents.*")
    body, found = file.read_bytes(), []
    while len(body) > 12:  # a length of 8 bytes and its checksum of 4, the message, and its checksum of 4
        (length,) = struct.unpack("<Q", body[:8])
        event = Event.FromString(body[12 : 12 + length])
        found += [(each.tag, event.step, each.simple_value) for each in event.summary.value]
        body = body[16 + length :]
    return found


def test_each_record_of_the_curve_is_written_once_as_it_comes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.local.run.EVENTS_EVERY_S", 0.01)
    records = [{"kind": "train", "step": 1, "loss": 2.0, "num_steps": 3}, {"kind": "eval", "step": 1, "loss": 1.5}]
    lines = [json.dumps(record) + "\n" for record in records]
    with event_files_beside(store, "r", tmp_path):
        assert list(tmp_path.iterdir()) == []  # nothing was recorded yet
        store.put(runs.run_key("r", runs.METRICS), "".join(lines).encode())
        wait_until(lambda: (tmp_path / "tensorboard").is_dir() and len(scalars(tmp_path)) == 3)
        lines += ['{"kind": "train", "step": 2, "loss": 1.0}\n', '{"kind": "train", "step": 3, "loss": null}\n']
        store.put(runs.run_key("r", runs.METRICS), "".join(lines).encode())
    first = [("train/loss", 1, 2.0), ("train/num_steps", 1, 3.0), ("eval/loss", 1, 1.5)]
    assert scalars(tmp_path) == [*first, ("train/loss", 2, 1.0)]
