"""What a release wrote, read by today's commands and steps. The files as they lie are the truth to compare with."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from components.config import config_file
from components.gate.gate import run_gate
from components.prepare.dataset import load_split
from components.prepare.prepare import prepare, prepare_if_new
from components.report.report import run_report
from components.step.step import first_step
from tests.frozen.registry import ADAPTER, PLACE, Frozen
from tests.pipelines.command_line import body, fineloop

RUNS = ("promoted", "held")


@pytest.fixture
def adapters(forked: None, frozen: Frozen, tmp_path: Path):
    """`fineloop adapters VERB ...` on the registry; gives the answer."""

    def run(*arguments: str) -> dict[str, Any]:
        done = fineloop("adapters", *arguments, *PLACE, "--home", tmp_path / "home", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return body(done)

    return run


def text_of(page: str) -> str:
    """Without the confidence of bounds, which a page names once."""
    text = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())
    return re.sub(r", (?:each )?with [\d.]+ % confidence", "", text)


def test_the_adapter_and_its_versions_are_listed(frozen, adapters):
    assert [each["name"] for each in adapters("list")["adapters"]] == [ADAPTER]
    versions = {each["version"]: each for each in adapters("list", ADAPTER)["versions"]}
    assert versions.keys() == {frozen.version(run_id) for run_id in RUNS}
    assert versions[frozen.version("promoted")]["aliases"] == ["production"]


def test_a_version_is_shown_with_what_its_run_measured(frozen, adapters):
    shown = adapters("show", ADAPTER)
    assert shown["version"] == frozen.version("promoted")
    assert shown["metrics"] == frozen.json("runs/promoted/evaluation.json")["models"]["candidate"]["metrics"]
    lineage = frozen.json(f"adapters/{ADAPTER}/versions/{shown['version']}/lineage.json")
    assert shown["servable_as"] == lineage["recipe"]["serving"]["servable_as"]
    assert adapters("lineage", ADAPTER) == lineage
    assert frozen.config("promoted").digest == lineage["config_sha256"]


def test_the_history_is_every_event_that_was_written(frozen, adapters):
    written = [json.loads(path.read_text()) for path in sorted(frozen.path(f"adapters/{ADAPTER}/events").iterdir())]
    events, keys = adapters("history", ADAPTER)["events"], ("id", "time", "kind", "body")
    assert [event["kind"] for event in events] == ["published", "promoted", "published", "refused"]
    assert [[event[key] for key in keys] for event in events] == [[event[key] for key in keys] for event in written]


def test_versions_verify_and_are_pulled_with_the_base_that_loftq_made(frozen, adapters, tmp_path):
    version = frozen.version("held")
    for run_id in RUNS:
        assert adapters("verify", f"{ADAPTER}@{frozen.version(run_id)}")["verified"]
    pulled = adapters("pull", f"{ADAPTER}@{version}", "--to", str(tmp_path / "here"), "--with-base")
    (chosen,) = frozen.path("bases").glob("*/chosen.json")
    base = chosen.parent / json.loads(chosen.read_text())["folder"]
    for folder, source in ((pulled["path"], f"adapters/{ADAPTER}/versions/{version}"), (pulled["base_path"], base)):
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        assert files == {path.name: path.read_bytes() for path in frozen.path(source).iterdir()}


def test_the_version_that_was_held_is_promoted_by_hand_over_its_gate_and_rolled_back(frozen, adapters):
    old, other = frozen.version("promoted"), frozen.version("held")
    moved = adapters("promote", f"{ADAPTER}@{other}", "--by", "ada", "--reason", "checked")
    assert moved["from"] == old
    assert adapters("history", ADAPTER)["events"][-1]["kind"] == "overridden"
    moved = adapters("rollback", ADAPTER)
    assert (moved["from"], moved["to"]) == (other, old)
    assert adapters("show", f"{ADAPTER}@production")["version"] == old


@pytest.mark.parametrize("run_id", RUNS)
def test_the_gate_decides_by_the_release_s_evaluation_as_the_release_did(run_id, frozen):
    written = frozen.json(f"runs/{run_id}/decision.json")
    events = len(list(frozen.store.list(f"adapters/{ADAPTER}/events/")))
    run_gate(frozen.config(run_id), frozen.store, run_id)
    found = frozen.store.get_json(f"runs/{run_id}/decision.json")
    assert (found["decision"], found["version"]) == (written["decision"], written["version"])
    keys = ("field", "passed", "candidate", "other")
    then, now = ([[rule[key] for key in keys] for rule in decision["rules"]] for decision in (written, found))
    assert [rule for rule in now if rule[0] in {field for field, *_ in then}] == then
    assert len(list(frozen.store.list(f"adapters/{ADAPTER}/events/"))) == events


@pytest.mark.parametrize("run_id", RUNS)
def test_a_report_tells_of_the_release_s_run_what_its_own_report_told(run_id, frozen):
    evaluation, decision = (frozen.json(f"runs/{run_id}/{name}.json") for name in ("evaluation", "decision"))
    losses = [model["metrics"]["loss"] for model in evaluation["models"].values() if model]
    dataset = frozen.json(f"datasets/{evaluation['dataset_id']}/manifest.json")["about"]
    facts = [decision["version"], *map(text_of, decision["reasons"]), *[f"{loss:.3f}" for loss in losses]]
    facts += [sample["prompt"] for sample in evaluation["samples"]]
    facts += [f"Training records {dataset['train_records']}", f"seed = {frozen.config(run_id).train.seed}"]
    last_step = frozen.json(f"runs/{run_id}/finetune.json")["steps"]
    facts += [f"step {last_step}: held-out loss"]
    before = text_of(frozen.path(f"runs/{run_id}/report.html").read_text())
    assert [fact for fact in facts if fact not in before] == []

    run_report(frozen.config(run_id), frozen.store, run_id, result={})
    after = text_of(frozen.store.get(f"runs/{run_id}/report.html").decode())
    assert [fact for fact in facts if fact not in after] == []


def test_the_same_data_gives_the_records_of_the_dataset_that_is_there_under_an_id_of_its_splits(frozen):
    before = frozen.json("runs/promoted/finetune.json")["dataset_uri"]
    found = prepare(frozen.config("promoted"), frozen.store)
    assert found.created
    for split in ("train", "eval"):
        assert load_split(frozen.store, found.uri, split) == load_split(frozen.store, before, split)


def test_what_the_release_had_read_is_not_new(frozen):
    config = frozen.config("promoted", "data.min_new_records=1")
    with first_step("prepare", config_file.as_table(config), "next") as run:
        assert prepare_if_new(run) is None
    frozen.store.delete([f"adapters/{ADAPTER}/watermark.json"])
    with first_step("prepare", config_file.as_table(config), "after") as run:
        assert prepare_if_new(run) is not None
