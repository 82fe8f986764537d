"""What a webhook is told of a run that moved no alias: each run is one that the steps left in a store."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from components.config.schema import AnnounceConfig, RunConfig
from components.handover import announce as announcing
from components.handover.announce import signature
from components.records import runs
from components.records.steps import StepRecord
from components.report.report import run_report
from components.report.run_files import RunFiles
from components.step.step import INTERRUPTED
from components.store.store import Store
from tests.components.report import example_runs
from tests.components.report.example_runs import CANDIDATE, CONFIG, put
from tests.doubles.http_server import Answer, serving

NAME = CONFIG.adapter.name


@dataclass
class Receiver:
    """A webhook's receiver: what it got, and the status that it answers."""

    url: str = ""
    status: int = 200
    slow_s: float = 0
    got: list[tuple[bytes, Mapping[str, str]]] = field(default_factory=list)

    def handle(self, _verb: str, _path: str, _query: Any, body: bytes, headers: Mapping[str, str]) -> Answer:
        self.got.append((body, headers))
        time.sleep(self.slow_s)
        return self.status, {}

    def config(self, **announce: Any) -> RunConfig:
        return CONFIG.model_copy(update={"announce": AnnounceConfig(webhook=self.url, **announce)})

    @property
    def last(self) -> dict[str, Any]:
        return dict(json.loads(self.got[-1][0]))


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(announcing, "PAUSE_S", 0)
    made = Receiver()
    with serving(made.handle) as made.url:
        yield made


def reported(store: Store, config: RunConfig, run: RunFiles, *, state: str = "SUCCEEDED") -> dict[str, Any]:
    """The report step of a run, with its record."""
    put(store, replace(run, config_toml=""))
    result: dict[str, Any] = {"state": state}
    run_report(config, store, run.run_id, result=result)
    record = StepRecord(step="report", status="succeeded", started_at="2026-12-01", seconds=1, result=result)
    runs.write(store, run.run_id, record)
    return result


@pytest.mark.parametrize(
    ("build", "kind", "reason", "command"),
    [
        (example_runs.held_run, "held", "worse", f"fineloop chat {NAME}@{CANDIDATE}"),
        (example_runs.skipped_run, "skipped", "nothing new since run", "fineloop runs show 2026-11-26-0200-idle"),
        (example_runs.failed_run, "failed", "worker 1 was lost: out of memory", "--run-id 2026-11-26-0200-dead"),
    ],
)
def test_a_night_is_told_once_with_its_reason_and_a_command(
    store: Store,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[], RunFiles],
    kind: str,
    reason: str,
    command: str,
) -> None:
    monkeypatch.setenv("FINELOOP_WEBHOOK_SECRET", "hush-hush")
    run = build()
    result = reported(store, receiver.config(), run, state="FAILED" if kind == "failed" else "SUCCEEDED")
    ((body, headers),) = receiver.got
    assert headers["X-Fineloop-Event"] == receiver.last["kind"] == kind
    assert headers["X-Fineloop-Delivery"] == receiver.last["event_id"] == result["event_id"]
    assert headers["X-Hub-Signature-256"] == signature(body, "hush-hush")
    assert reason in receiver.last["reason"]
    assert command in receiver.last["commands"][0]["command"]
    assert (receiver.last["adapter"], receiver.last["run_id"]) == (NAME, run.run_id)
    assert receiver.last["report_uri"] == result["report_uri"]
    assert "version" not in receiver.last  # or a receiver of moves would deploy what was held
    assert result["announced"] == {"webhook": "told"}
    assert reported(store, receiver.config(), run, state=result["state"])["announced"] == {"webhook": "told"}
    assert len(receiver.got) == 1


def test_one_that_waits_for_a_person_names_the_approval(store: Store, receiver: Receiver) -> None:
    reported(store, receiver.config(), example_runs.waiting_run())
    commands = [each["command"] for each in receiver.last["commands"]]
    assert f"fineloop adapters approve {NAME}@{CANDIDATE} --by NAME --reason TEXT" in commands


def test_a_step_that_was_killed_before_it_could_say_why_is_a_failure_too(store: Store, receiver: Receiver) -> None:
    kubeflow = "7506d98d-86d6-4032-ad2c-97c8dca660a4"
    run = RunFiles(kubeflow, NAME, steps=example_runs.steps("prepare"))
    reported(store, receiver.config(), run, state="FAILED")
    assert receiver.last["kind"] == "failed"
    assert "it was killed, or somebody stopped the run" in receiver.last["reason"]
    assert receiver.last["commands"][0]["command"] == f"fineloop runs show {kubeflow}"


def test_a_run_that_goes_on_and_ends_in_another_way_is_told_again(store: Store, receiver: Receiver) -> None:
    held = example_runs.held_run()
    failed = replace(example_runs.failed_run(), run_id=held.run_id)
    reported(store, receiver.config(), failed, state="FAILED")
    reported(store, receiver.config(), held)
    assert [json.loads(body)["kind"] for body, _ in receiver.got] == ["failed", "held"]
    assert len({json.loads(body)["event_id"] for body, _ in receiver.got}) == 2


@pytest.mark.parametrize(("end", "kind"), [("hold", "held"), ("skip", "skipped")])
def test_a_night_whose_decision_was_replaced_since_is_told_by_the_step_that_ended_it(
    store: Store, receiver: Receiver, end: str, kind: str
) -> None:
    promoted = example_runs.promoted_run()
    record = StepRecord(step=end, status="succeeded", started_at="2026-12-01", seconds=1, result={"reasons": ["worse"]})
    run = replace(promoted, steps=[record])
    reported(store, receiver.config(), run)
    reported(store, receiver.config(), run)
    assert [json.loads(body)["kind"] for body, _ in receiver.got] == [kind]
    assert (receiver.last["reason"], receiver.last["title"]) == ("worse", f"{NAME}: production stays as it is")
    assert "rollback" not in str(receiver.last["commands"])
    reported(store, receiver.config(), replace(promoted, steps=[*promoted.steps, record]))  # it moved all the same
    assert len(receiver.got) == 1


def test_nothing_is_told_of_a_promotion_an_interruption_or_what_the_config_leaves_out(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "announced" not in reported(store, receiver.config(), example_runs.promoted_run())
    reported(store, receiver.config(nights=["failed"]), example_runs.held_run())
    reported(store, CONFIG, example_runs.held_run())
    monkeypatch.setenv(INTERRUPTED, "1")
    reported(store, receiver.config(), RunFiles("stopped", NAME), state="FAILED")
    assert receiver.got == []


def test_a_receiver_that_refuses_fails_no_report_and_is_told_by_the_next(
    store: Store, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.status = 403
    with caplog.at_level(logging.WARNING):
        result = reported(store, receiver.config(), example_runs.held_run())
    assert "403" in result["announced"]["webhook"]
    assert "announce.webhook was not notified of how this run ended: POST" in caplog.text
    assert store.exists(f"runs/{example_runs.held_run().run_id}/report.html")
    receiver.status = 200
    assert reported(store, receiver.config(), example_runs.held_run())["announced"] == {"webhook": "told"}
    assert receiver.got[0][1]["X-Fineloop-Delivery"] == receiver.got[1][1]["X-Fineloop-Delivery"]


def test_a_slow_receiver_holds_up_no_report(store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcing, "PATIENCE_S", 0.1)
    receiver.slow_s = 1
    result = reported(store, receiver.config(), example_runs.held_run())
    assert "no whole answer after 0.1 s" in result["announced"]["webhook"]
    assert store.exists(f"pages/{NAME}.html")


def test_what_a_training_wrote_is_sent_without_secrets_and_control_characters_and_not_at_length(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    text = "no answer of https://ann:pa55word@hub.example/x with wJalrXUtnFEMI\x1b[2J\u202e" + "x" * 100_000
    (prepare, finetune) = example_runs.failed_run().steps
    error = {"error": {"kind": "JobError", "message": text}}
    run = replace(example_runs.failed_run(), steps=[prepare, finetune.model_copy(update={"result": error})])
    reported(store, receiver.config(), run, state="FAILED")
    reason = receiver.last["reason"]
    assert reason.startswith(r"no answer of https://***@hub.example/x with ***\x1b[2J\u202exxx")
    assert len(reason) < 1000


def test_a_training_cannot_say_in_the_steps_place_that_its_night_was_told(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = example_runs.held_run()
    foreseen = reported(store, receiver.config(), run)  # with all that a training knows
    assert foreseen["announced"] == {"webhook": "told"}
    monkeypatch.setenv("FINELOOP_WEBHOOK_SECRET", "hush-hush")
    assert reported(store, receiver.config(), run)["event_id"] != foreseen["event_id"]
    assert len(receiver.got) == 2


def test_a_record_that_a_training_wrote_in_the_steps_place_fails_no_report(store: Store, receiver: Receiver) -> None:
    run = example_runs.held_run()
    result = reported(store, receiver.config(), run)
    record = StepRecord(step="report", status="succeeded", started_at="", seconds=1, result={**result, "announced": 7})
    runs.write(store, run.run_id, record)
    put(store, replace(run, config_toml=""))
    run_report(receiver.config(), store, run.run_id, result={"state": "SUCCEEDED"})
    assert len(receiver.got) == 2
