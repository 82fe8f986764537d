"""`fineloop watch`: the screen of a run that another process writes into the store, step by step."""

import io
import json
from pathlib import Path

import pytest

from components.config import config_file
from components.records import runs
from components.records.steps import Evaluation, Measured, StepRecord
from components.shared.errors import StoreError
from components.store.store import Store
from pipelines.cli import main
from pipelines.local import display
from pipelines.local.display import Display, Elsewhere, follow


def step(store: Store, name: str, minute: int, status: str = "succeeded", **result: object) -> None:
    began = f"2026-11-29T01:{minute:02d}:00+00:00"
    record = StepRecord(step=name, status=status, started_at=began, seconds=4.0, result=result)  # type: ignore[arg-type]
    runs.write(store, "r1", record)


def curve(store: Store, steps: int) -> None:
    records = [
        {"kind": "train", "step": n, "num_steps": 40, "loss": 2 - n / 40, "elapsed_s": n, "learning_rate": 1e-4}
        for n in range(1, steps + 1)
    ]
    if steps > 20:
        records.append({"kind": "eval", "step": 20, "loss": 1.25, "records": 9})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    store.put(runs.run_key("r1", runs.METRICS), lines.encode())


def test_a_run_is_shown_while_it_goes_on_and_the_watching_ends_with_it(store: Store) -> None:
    screen = io.StringIO()
    run = Elsewhere(store, "r1", Display(screen, live=False, clock=iter(range(0, 9999, 9)).__next__))
    what_happens = iter(
        [
            lambda: step(store, "prepare", 1),
            lambda: curve(store, 10),
            lambda: curve(store, 30),
            lambda: step(store, "finetune", 2),
            lambda: step(store, "gate", 5),
            lambda: step(store, "report", 6),
        ]
    )
    looks = []

    def tick() -> None:
        looks.append(screen.getvalue())
        next(what_happens)()

    follow(run, tick, every_s=0.01)
    lines = screen.getvalue().splitlines()
    assert [line for line in lines if line.endswith("started")] == [
        f"[{name}] started" for name in ("prepare", "finetune", "gate", "report")
    ]
    assert "[finetune] step 10/40  loss 1.750" in lines
    assert "[finetune] step 30/40  loss 1.250  held-out 1.2500 at step 20" in lines
    assert "[finetune] finished in 4.0 s" in lines
    assert "report" not in looks[-1]
    assert run.decision() is None


@pytest.mark.parametrize("command", [["runs", "show", "r", "--follow", "-c"], ["watch", "r", "-c"]], ids=" ".join)
def test_a_failed_step_ends_the_watching_with_its_error(
    store: Store, config_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    config = config_file.load(config_path)
    store.put(runs.run_key("r1", runs.CONFIG), config_file.dumps(config).encode())
    step(store, "prepare", 1)
    error = {"kind": "JobError", "message": "a worker ran out of memory"}
    step(store, "finetune", 2, "failed", error=error)
    assert main([*command, str(config_path), "--json"]) == 1
    said = capsys.readouterr()
    assert ("is called fineloop runs show --follow now" in said.err) == (command[0] == "watch")
    assert json.loads(said.out) == {"run_id": "r1", "decision": None, "error": error}
    assert "r1 failed in finetune: a worker ran out of memory" in said.err


def test_a_training_without_a_gate_is_over_when_nothing_follows(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Elsewhere(store, "r1", Display(io.StringIO(), live=False))
    step(store, "finetune", 1)
    runs.write(
        store, "r1", Evaluation(run_id="r1", records=9, models={"candidate": Measured(version="v1", metrics={})})
    )
    assert not run.look()
    monkeypatch.setattr(display, "QUIET_S", -60.0)
    assert run.look()


def test_a_store_that_is_away_is_asked_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise StoreError("503")

    screen = io.StringIO()
    run = Elsewhere(store, "r1", Display(screen, live=False))
    with monkeypatch.context() as away:
        away.setattr(store, "list", refuses)
        assert not run.look()
    assert "the store does not answer, and is asked again: 503" in screen.getvalue()
    step(store, "report", 6)
    assert run.look()
