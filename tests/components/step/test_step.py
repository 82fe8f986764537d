import logging
import subprocess
import sys
import tomllib
from typing import Any

import pytest
from google.protobuf import json_format, struct_pb2

from components.config import config_file
from components.shared.errors import ConfigError, DataError, FineloopError, IntegrityError, UserError
from components.shared.protocol import Line, find_failure, parse_line, say, say_failure
from components.step.step import first_step, last_step, step
from components.store import folders
from components.store.store import Store

CONFIG = """
[adapter]
name = "it's-a-test"
[model]
base = "nobody/none"
[data]
source = "data.jsonl"
[registry]
bucket = "{bucket}"
prefix = "{prefix}"
"""


def given(store: Store, *changes: str) -> dict[str, Any]:
    text = CONFIG.format(bucket=store.bucket, prefix=store.prefix).replace("it's-a-test", "a-test")
    return config_file.as_table(config_file.loads(text, changes))


@pytest.mark.parametrize("kind", [DataError, IntegrityError, ZeroDivisionError])
def test_an_error_of_ours_crosses_as_itself_and_a_foreign_one_with_its_name(kind: type[Exception], capsys) -> None:
    message = 'data.source "x"\nholds {"a": 1} and \u00e9\u4e2d, it\'s [prepare] failed {}'
    say_failure("prepare", kind(message))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    again = find_failure(f"noise\n\t  {printed}more noise\n")
    assert again is not None
    if issubclass(kind, FineloopError):
        assert (type(again), str(again)) == (kind, message)
    else:
        assert (str(again), again.exit_code) == (f"ZeroDivisionError: {message}", 1)


@pytest.mark.parametrize("text", ["plain", "[KFP Executor 2026-11-25]: x", "[prepare]", "x [prepare] y", "[Prepare] y"])
def test_other_lines_are_not_of_the_protocol(text: str) -> None:
    assert parse_line(text) is None
    for prefix in ("(RayTrainWorker pid=12083) ", "\x1b[36m(Train pid=1, ip=10.0.0.7)\x1b[0m "):  # and those are
        assert parse_line(f"    {prefix}[finetune] step 3/10 loss 1.2") == Line("finetune", "step 3/10 loss 1.2")
    for body in ("", "{}", '{"error": "X"}', "{broken", '{"error": 1, "message": 2}'):
        assert parse_line(f"[prepare] failed {body}") == Line("prepare", f"failed {body}".strip())


def test_said_text_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("gate", "two\nlines\tand   spaces")
    assert capsys.readouterr().out == "[gate] two lines and spaces\n"


def test_the_last_failure_of_a_log_counts() -> None:
    log = '[finetune] failed {{"error": "DataError", "message": "{}", "exit_code": 2}}\n'
    failure = find_failure(f"{log.format('first')}{log.format('second')}[finetune] over\n")
    assert failure is not None
    assert str(failure) == "second"


def test_a_step_records_config_and_result(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    table = given(store)
    with first_step("prepare", table, "run-1") as step_run:
        step_run.result["records"] = 3
        logging.getLogger("components.prepare").info("read %d\nrows", 3)
    record = store.get_json("runs/run-1/steps/prepare.json")
    assert (record["status"], record["result"]) == ("succeeded", {"records": 3})
    assert tomllib.loads(store.get("runs/run-1/config.toml").decode()) == table
    lines = [parse_line(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.text for line in lines if line][:2] == ["started", "read 3 rows"]
    assert lines[-1] is not None
    assert lines[-1].seconds is not None


def test_a_failing_step_is_recorded_told_and_raised(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with first_step("prepare", given(store), "run-2") as step_run:
            step_run.result["seen"] = 1
            raise DataError("no rows")

    with pytest.raises(DataError, match="no rows"):
        fail()
    record = store.get_json("runs/run-2/steps/prepare.json")
    assert record["status"] == "failed"
    assert record["result"] == {"seen": 1, "error": {"kind": "DataError", "message": "no rows"}}
    printed = capsys.readouterr().out
    failure = find_failure(printed)
    assert failure.exit_code == 2
    assert "finished" not in printed
    with first_step("prepare", given(store), "run-2"):  # again
        pass
    assert store.get_json("runs/run-2/steps/prepare.json")["status"] == "succeeded"


def test_a_run_keeps_the_config_it_began_with_but_may_have_other_workers(store: Store) -> None:
    with first_step("prepare", given(store), "run-4"):
        pass
    with first_step("prepare", given(store, "ray.num_workers=2", "train.zero_stage=3"), "run-4") as again:
        pass
    with step("gate", again.run_uri, again.config.digest) as later:
        assert (later.run_id, later.config.ray.num_workers, later.store.uri("")) == ("run-4", 2, store.uri(""))
    assert store.get_json("runs/run-4/steps/gate.json")["status"] == "succeeded"
    with (
        pytest.raises(ConfigError, match="began with another config"),
        first_step("prepare", given(store, "train.learning_rate=0.5"), "run-4"),
    ):
        raise AssertionError("the step must not begin")


def test_a_config_that_was_changed_after_the_run_began_is_refused(store: Store) -> None:
    with first_step("prepare", given(store), "run-6") as first:
        pass
    looser = config_file.validate(given(store, "gate.better_than_base_by=-9.0"))
    store.put("runs/run-6/config.toml", config_file.dumps(looser).encode())
    with (
        pytest.raises(IntegrityError, match=f"the run began with {first.config.digest}: it was changed since"),
        step("gate", first.run_uri, first.config.digest),
    ):
        raise AssertionError("the step must not begin")


def test_a_dataset_that_was_changed_after_it_was_prepared_is_refused(store: Store) -> None:
    with first_step("prepare", given(store), "run-9") as first:
        pass
    begun, uri = (first.run_uri, first.config.digest), store.uri("datasets/d1")
    prepared = folders.publish(store, "datasets/d1", {"profile.json": b"{}"})
    with step("gate", *begun, uri, prepared.sha256) as later:
        assert later.dataset_sha256 == prepared.sha256
    store.delete([info.key for info in store.list("datasets/d1/")])
    planted = folders.publish(store, "datasets/d1", {"profile.json": b'{"rows": 9}'})
    said = f"{uri}/manifest.json has sha256 {planted.sha256}, but {prepared.sha256} was vouched for"
    with pytest.raises(IntegrityError, match=said), step("gate", *begun, uri, prepared.sha256):
        raise AssertionError("the step must not begin")
    with step("gate", *begun, uri) as of_an_earlier_release:  # whose pipelines pass no hash
        assert of_an_earlier_release.dataset_sha256 == ""


def test_the_last_step_takes_the_config_that_was_recorded_or_else_the_one_it_is_given(store: Store) -> None:
    with first_step("prepare", given(store), "run-7", overrides={"epochs": "train.epochs=3"}):
        pass
    for run_id, epochs in (("run-7", 3), ("run-8", 1)):
        with last_step("report", given(store), run_id) as step_run:
            assert step_run.config.train.epochs == epochs


def test_a_config_that_a_training_rewrote_does_not_say_whom_the_last_step_tells(store: Store) -> None:
    ours, theirs = ("http://ours.example/", "http://theirs.example/")
    with first_step("prepare", given(store, f'announce.webhook="{ours}"'), "run-11") as step_run:
        changed = config_file.loads(config_file.dumps(step_run.config), [f'announce.webhook="{theirs}"'])
    store.put("runs/run-11/config.toml", config_file.dumps(changed).encode())
    with last_step("report", given(store, f'announce.webhook="{ours}"'), "run-11") as step_run:
        assert step_run.config.announce.webhook == ours


def test_a_config_in_doubles_as_kubeflow_hands_it_over_is_the_same_config(store: Store) -> None:
    """kfp.local makes a protobuf Struct of it, whose numbers are doubles (google/protobuf/struct.proto)."""
    table = given(store, "train.seed=7", "train.learning_rate=2e-4", "ray.timeout_s=86400")
    struct = struct_pb2.Struct()
    struct.update(table)
    as_doubles = {key: json_format.MessageToDict(value) for key, value in struct.fields.items()}
    with first_step("prepare", as_doubles, "run-9") as step_run:
        assert step_run.config == config_file.validate(table)


def test_a_wrong_config_is_told_before_any_store_is_asked(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError), first_step("prepare", {"adapter": {"nam": 1}}, "run-10"):
        pass
    failure = find_failure(capsys.readouterr().out)
    assert failure is not None
    assert "did you mean adapter.name" in str(failure)


@pytest.mark.parametrize("run_id", ["", "../x", "a b", "x" * 101, "a/b"])
def test_a_run_id_that_could_escape_its_folder_is_refused(store: Store, run_id: str) -> None:
    with pytest.raises(UserError, match="run_id"), first_step("prepare", given(store), run_id):
        pass


def test_the_log_of_components_reaches_no_other_handler(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with first_step("gate", given(store), "run-6"):
        logging.getLogger("components.gate").info("once")
    assert "once" not in caplog.text
    assert logging.getLogger("components").propagate


def test_the_modules_of_the_steps_load_nothing_heavy_but_arrow() -> None:
    steps = ("finetune.finetune", "evaluate.evaluate", "promote.promote", "prepare.prepare", "ray_cluster.submit")
    heavy = {"boto3", "kfp", "ray", "torch", "transformers", "duckdb", "simple_icd_10_cm"}
    code = f"import sys, {', '.join(f'components.{name}' for name in steps)}\nprint({heavy} & {{*sys.modules}})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"
