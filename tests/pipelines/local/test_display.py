import io
import json
from unittest.mock import Mock

import pytest

from components.config import config_file
from components.records import runs
from components.records.steps import Evaluation, Measured, StepRecord
from components.shared.errors import StoreError
from components.shared.protocol import TRAINED, Line
from components.store.store import Store
from pipelines.cli import main
from pipelines.local import display
from pipelines.local.display import PLAIN_EVERY_S, Display, Elsewhere


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def last_row(text: str) -> str:
    return text.rstrip("\n").rpartition("\r\x1b[2K")[2]


def plain(*lines: Line) -> list[str]:
    """What a stream that is no terminal has after these."""
    stream = io.StringIO()
    shown = Display(stream, live=False)
    for line in lines:
        shown.line(line)
    return stream.getvalue().splitlines()


@pytest.fixture
def live(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> tuple[Display, io.StringIO]:
    """On a terminal of 60 columns without colours."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    return Display(stream, live=True, clock=clock), stream


def test_plain_lines_are_kept_and_progress_is_thinned(clock: Clock) -> None:
    stream = io.StringIO()
    display = Display(stream, live=False, clock=clock)
    display.line(Line("finetune", "started"))
    for step in range(1, 101):
        clock.now += 0.2
        display.line(Line("finetune", f"step {step}/100 loss 1.0"))
    display.line(Line("finetune", "early stop"))
    display.line(Line("finetune", "finished in 20.0 s"))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[finetune] started"
    assert lines[-2:] == ["[finetune] early stop", "[finetune] finished in 20.0 s"]
    assert len([line for line in lines if "/100" in line]) == 20 // PLAIN_EVERY_S
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


@pytest.mark.parametrize(
    ("live", "lines"),
    [
        (False, ["prepare] started", "about 2 min", "prepare] finished in 3.0 s", "after it", "finetune] started", ""]),
        (True, ["about 2 min", "prepare       3.0 s", "after it", "finetune"]),
    ],
)
def test_a_line_of_its_own_stands_above_the_step_that_runs(clock, monkeypatch, live, lines):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    display = Display(stream, live=live, clock=clock)
    display.start("prepare")
    display.message("about 2 min")
    display.finish(3.0)
    display.message("after it")
    display.line(Line("finetune", "started"))
    display.close()
    shown = stream.getvalue().split("\n")
    assert all(words in line for words, line in zip(lines, shown, strict=False)), shown


def test_what_comes_late_of_a_step_does_not_begin_it_again() -> None:
    begun_and_ended = [Line("finetune", text) for text in ("started", "published v1", "finished in 20.0 s")]
    next_step = [Line("evaluate", "started"), Line("finetune", "step 5: held-out loss 1.0"), Line("evaluate", "base")]
    failure = Line("evaluate", 'failed {"error": "DataError", "message": "x", "exit_code": 2}')  # which is not shown
    again = Line("finetune", "started")  # where a step is tried again
    assert plain(*begun_and_ended, *next_step, failure, again) == [
        *("[finetune] started", "[finetune] published v1", "[finetune] finished in 20.0 s"),
        *("[evaluate] started", "[evaluate] base", "[finetune] started"),
    ]


def test_a_live_step_is_one_line_with_its_last_word(live: tuple[Display, io.StringIO], clock: Clock) -> None:
    display, stream = live
    display.start("prepare")
    display.line(Line("prepare", "261 records to train on"))
    clock.now += 3
    display.tick()
    assert last_row(stream.getvalue()).endswith("prepare       3.0 s  261 records to train on")
    display.line(Line("prepare", "finished in 3.1 s"))
    display.line(Line("finetune", "started"))
    display.line(Line("finetune", "x" * 200))
    assert stream.getvalue().count("\n") == 1
    assert "✓ prepare       3.1 s  261 records to train on\n" in stream.getvalue()
    assert len(last_row(stream.getvalue())) == 59


def test_what_stays_of_a_live_step_is_whole_and_of_a_training_its_loss(live: tuple[Display, io.StringIO]) -> None:
    display, stream = live
    display.start("finetune")
    for text in ("step 9: held-out loss 0.2 on 1 record", "publishing 3 files", TRAINED):
        display.line(Line("finetune", text))
    display.start("evaluate")
    display.line(Line("evaluate", "candidate: " + "x" * 200))
    display.fail()
    display.fail()
    display.close()
    assert "✓ finetune      0.0 s  step 9: held-out loss 0.2 on 1 record\n" in stream.getvalue()
    assert f"candidate: {'x' * 200}\n" in stream.getvalue()
    assert stream.getvalue().count("✗ evaluate") == 1


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


def test_a_run_is_shown_while_it_goes_on_and_the_watching_ends_with_it(store, monkeypatch):
    monkeypatch.setattr(display, "EVERY_S", 0.01)
    screen = io.StringIO()
    shown = Display(screen, live=False, clock=iter(range(0, 9999, 9)).__next__)
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

    monkeypatch.setattr(shown, "tick", tick)
    Elsewhere(store, "r1", shown).follow()
    lines = screen.getvalue().splitlines()
    assert [line for line in lines if line.endswith("started")] == [
        f"[{name}] started" for name in ("prepare", "finetune", "gate", "report")
    ]
    assert "[finetune] step 10/40  loss 1.750" in lines
    assert "[finetune] step 30/40  loss 1.250  held-out 1.2500 at step 20" in lines
    assert "[finetune] finished in 4.0 s" in lines
    assert "report" not in looks[-1]


@pytest.mark.parametrize("command", [["runs", "show", "r", "--follow", "-c"], ["watch", "r", "-c"]], ids=" ".join)
def test_a_failed_step_ends_the_watching_with_its_error(store, config_path, capsys, command):
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
    screen = io.StringIO()
    run = Elsewhere(store, "r1", Display(screen, live=False))
    with monkeypatch.context() as away:
        away.setattr(store, "list", Mock(side_effect=StoreError("503")))
        assert not run.look()
    assert "the store does not answer, and is asked again: 503" in screen.getvalue()
    step(store, "report", 6)
    assert run.look()
