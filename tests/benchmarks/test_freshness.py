"""What checks each night would have said, replayed over what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import freshness


def test_a_replay_says_when_the_stale_adapter_is_shown_to_be_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {freshness.STALE: 6.0, freshness.REPLAYED: 4.0}
    noise = np.random.default_rng(0).normal(0, 0.1, 100)
    for arm, loss in losses.items():
        new = {"loss": (loss + noise).tolist(), "exact_match": [float(loss < 5)] * 100, "tokens": [2] * 100}
        freshness._file(tmp_path, 1, arm).write_text(json.dumps({"new": new}))
    freshness.replay(tmp_path, 3, a_night=20, replays=3)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert rows == [["1", metric, "100", "40", "3", "0"] for metric in ("exact_match", "loss")]
