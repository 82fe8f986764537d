"""A base that no worker of the cluster holds: trained under ZeRO-3, evaluated together, gated and promoted."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Home, Tiny
from tests.models.tiny import build_base, colour_rows

pytestmark = [pytest.mark.e2e, pytest.mark.full]

# What the head says that it has: two workers share it, and the base's 59 MB are more than one of them may hold.
SMALL = {"memory": 60_000_000, "object_store_memory": 80_000_000}
WIDTH = 1280


@pytest.fixture(scope="module")
def small_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    directory: Path = tmp_path_factory.mktemp("large")
    base = build_base(directory / "base", width=WIDTH)
    data = directory / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(60)))
    home = Home(directory / "home")
    started = home.fineloop("ray", "up", environment={"RAY_OVERRIDE_RESOURCES": json.dumps(SMALL)})
    assert started.exit_code == 0, started.stderr
    yield Tiny(home, base, data)
    assert home.fineloop("ray", "down").exit_code == 0


def test_a_base_that_no_worker_holds_is_trained_evaluated_and_promoted(small_cluster: Tiny):
    changes = {
        "method.name": "lora",
        "train.zero_stage": 3,
        "train.max_steps": 6,
        "train.evals_per_epoch": 0,
        "evaluate.records": 6,
        "evaluate.max_new_tokens": 3,
        # What is learned in six steps is not the matter, nor how surely.
        "gate.better_than_base_by": -100,
        "gate.min_records": 2,
        "gate.limits": [],
    }
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    done = small_cluster.home.fineloop("run", *small_cluster.settings, *options)
    assert done.exit_code == 0, done.stderr
    assert "on 2 workers that hold the base together" in done.stderr
    assert done.answer["decision"] == "promote"
    assert done.answer["promoted"]
    candidate, base = (done.answer["metrics"][role] for role in ("candidate", "base"))
    assert candidate["loss"] < base["loss"]
    assert candidate["prompt_gain"] is not None
