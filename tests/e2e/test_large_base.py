"""A base that no worker of the cluster holds: trained under ZeRO-3, evaluated together, gated and promoted."""

import json
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Tiny, settings

pytestmark = [pytest.mark.e2e, pytest.mark.full]

# What the head says that it has: two workers share it, and the base's 59 MB are more than one of them may hold.
SMALL = {"memory": 60_000_000, "object_store_memory": 80_000_000}
WIDTH = 1280


@pytest.fixture(scope="module")
def small_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    made = Tiny.made(tmp_path_factory.mktemp("large"), rows=60, width=WIDTH)
    with made.is_up(RAY_OVERRIDE_RESOURCES=json.dumps(SMALL)):
        yield made


def test_a_base_that_no_worker_holds_is_trained_evaluated_and_promoted(small_cluster: Tiny):
    changes = {"method.name": "lora", "train.zero_stage": 3, "train.max_steps": 6, "train.evals_per_epoch": 0}
    changes |= {"evaluate.records": 6, "evaluate.max_new_tokens": 3}
    # What is learned in six steps is not the matter, nor how surely.
    changes |= {"gate.better_than_base_by": -100, "gate.min_records": 2, "gate.limits": []}
    done = small_cluster.home.does("run", *small_cluster.settings, *settings(changes))
    assert "on 2 workers that hold the base together" in done.screen
    assert done.answer["decision"] == "promote"
    assert done.answer["promoted"]
    candidate, base = (done.answer["metrics"][role] for role in ("candidate", "base"))
    assert candidate["loss"] < base["loss"]
    assert candidate["prompt_gain"] is not None
