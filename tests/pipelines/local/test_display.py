import io

import pytest

from components.shared.protocol import TRAINED, Line
from pipelines.local.display import PLAIN_EVERY_S, Display


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def last_row(text: str) -> str:
    return text.rstrip("\n").rpartition("\r\x1b[2K")[2]


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


def test_a_line_of_its_own_stands_above_the_step_that_runs(clock: Clock) -> None:
    for live in (False, True):
        stream = io.StringIO()
        display = Display(stream, live=live, clock=clock)
        display.start("prepare")
        display.message("about 2 min")
        display.finish(3.0)
        display.message("after it")
        display.line(Line("finetune", "started"))
        display.close()
        shown = [line.rpartition("\r\x1b[2K")[2] for line in stream.getvalue().split("\n")]
        if live:
            assert shown[0] == "about 2 min"
            assert [shown[1].split()[-3:], shown[2]] == [["prepare", "3.0", "s"], "after it"]
            assert "finetune" in shown[3]
        else:
            assert shown[:3] == ["[prepare] started", "about 2 min", "[prepare] finished in 3.0 s"]
            assert shown[3:5] == ["after it", "[finetune] started"]


def test_what_comes_late_of_a_step_does_not_begin_it_again(clock: Clock) -> None:
    stream = io.StringIO()
    display = Display(stream, live=False, clock=clock)
    for line in (
        *(Line("finetune", text) for text in ("started", "published v1", "finished in 20.0 s")),
        *(Line("evaluate", text) for text in ("started", "300 records")),
        Line("finetune", "step 5: held-out loss 1.0"),
        Line("evaluate", "base: 0.3"),
        Line("finetune", "started"),  # where a step is tried again
    ):
        display.line(line)
    assert stream.getvalue().splitlines() == [
        *("[finetune] started", "[finetune] published v1", "[finetune] finished in 20.0 s"),
        *("[evaluate] started", "[evaluate] 300 records", "[evaluate] base: 0.3", "[finetune] started"),
    ]


def test_a_live_step_is_one_line_with_its_last_word(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    display = Display(stream, live=True, clock=clock)
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


def test_what_stays_of_a_live_step_is_whole_and_of_a_training_its_loss(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    display = Display(stream, live=True, clock=clock)
    display.start("finetune")
    for text in ("step 9: held-out loss 0.2 on 1 record", "publishing 3 files", TRAINED):
        display.line(Line("finetune", text))
    display.start("evaluate")
    display.line(Line("evaluate", "candidate: " + "x" * 200))
    display.close()
    assert "✓ finetune      0.0 s  step 9: held-out loss 0.2 on 1 record\n" in stream.getvalue()
    assert f"candidate: {'x' * 200}\n" in stream.getvalue()


def test_a_failed_live_step_is_crossed_out_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    display = Display(stream, live=True, clock=clock)
    display.start("gate")
    display.fail()
    display.fail()
    display.close()
    assert stream.getvalue().count("✗ gate") == 1
    assert stream.getvalue().endswith("\n")


def test_the_line_that_carries_a_failure_is_not_shown(clock: Clock) -> None:
    stream = io.StringIO()
    display = Display(stream, live=False, clock=clock)
    display.line(Line("gate", 'failed {"error": "DataError", "message": "x", "exit_code": 2}'))
    assert stream.getvalue() == "[gate] started\n"
