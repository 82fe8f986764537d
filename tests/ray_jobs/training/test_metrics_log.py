import json
from typing import Any

from components.records import runs
from components.store.store import Store
from ray_jobs.training.metrics_log import MetricsLog


class Counted(int):
    """A step that counts how often any is compared."""

    comparisons = 0

    def __lt__(self, other: int) -> bool:
        Counted.comparisons += 1
        return int(self) < int(other)

    def __ge__(self, other: int) -> bool:
        Counted.comparisons += 1
        return int(self) >= int(other)

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return isinstance(other, int) and int(self) == int(other)

    __hash__ = int.__hash__


def record(kind: str, step: int, **values: Any) -> dict[str, Any]:
    train = {"num_steps": 400, "elapsed_s": 1.0, "learning_rate": 0.1, "tokens_per_s": 1.0}
    return {"kind": kind, "step": step, "loss": 1.0, "records": 1, **(train if kind == "train" else {}), **values}


def test_a_record_costs_as_much_late_in_a_training_as_early(store: Store):
    log = MetricsLog(store, "long")
    counts = []
    for step in range(1, 401):
        Counted.comparisons = 0
        log.add(record("train", Counted(step)))
        counts.append(Counted.comparisons)
    assert max(counts) < 10


def test_after_a_restart_each_record_takes_the_place_of_the_one_before(store: Store):
    first = MetricsLog(store, "run")
    for step in (1, 2, 3):
        first.add(record("train", step))
    first.add(record("eval", 2))  # of the third step no measurement came
    first.add(record("train", 3))
    first.upload()
    again = MetricsLog(store, "run")  # from the checkpoint of step 1
    again.add(record("train", 2, loss=0.5))
    again.add(record("eval", 2, loss=0.25))
    again.add(record("eval", 2, loss=0.125))
    again.upload()
    body, _ = store.read(runs.run_key("run", runs.METRICS))
    found = [(r["kind"], r["step"], r["loss"]) for r in map(json.loads, body.splitlines())]
    assert found == [("train", 1, 1.0), ("train", 2, 0.5), ("eval", 2, 0.125)]
