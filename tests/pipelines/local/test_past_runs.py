"""The store's runs, from the records that their steps left: listed without a Kubeflow, shown, compared and reproduced.

The judge of a comparison's bounds is the gate's own decision on a run whose champion is the other run's. What is
reproduced has real steps and stub jobs: an adapter there is one number, train.weight_decay.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config import config_file
from components.config.gate import GateConfig
from components.config.schema import AdapterConfig, RunConfig
from components.gate import policy
from components.gate.comparisons import read_evidence
from components.prepare.dataset import Message, Record
from components.records import runs
from components.records.steps import Decision, Evaluation, Measured, StepRecord, TrainResult, Usage
from components.records.sweep import TunedRate
from components.registry.between_runs import erase
from components.registry.versions import publish_version, read_lineage, resolve
from components.report.html import SEARCH
from components.report.run_files import RunFiles
from components.report.sections import run_facts
from components.shared.errors import ConfigError, DataError, ObjectMissing, UnknownName, UserError
from components.store.store import Store
from pipelines import cli
from pipelines.commands.arguments import load_config
from pipelines.local import past_runs
from pipelines.local.past_runs import recipe_of
from pipelines.local.run import Place, run
from tests.doubles import datasets
from tests.doubles.jobs_api import JobsApi
from tests.pipelines.command_line import body, fineloop

pytestmark = pytest.mark.usefixtures("forked")


def keep_steps(store: Store, config_path: Path, run_id: str, began: str, *overrides: str) -> None:
    config = config_file.load(config_path, overrides)
    store.put(runs.run_key(run_id, runs.CONFIG), config_file.dumps(config).encode())
    runs.write(store, run_id, StepRecord(step="prepare", status="succeeded", started_at=began, seconds=1.0))


USED = Usage(
    workers=4, gpu="NVIDIA H100 80GB HBM3", held_s=6 * 3600.0, in_steps_s=16_200.0, tokens=12_000_000, restarts=0,
    steps_repeated=0, flops=None, flops_with_parents=None, s3_requests=12, s3_read_bytes=0, s3_written_bytes=0,
    price=41.28, price_source="a list",
)  # fmt: skip


@pytest.fixture
def three(store: Store, config_path: Path) -> list[str]:
    """One that was promoted at a tuned rate, one that was only trained, and one that failed."""
    keep_steps(store, config_path, "aa-one", "2026-11-29T01:00:00+00:00", 'adapter.note="half the data"')
    keep_steps(store, config_path, "ab-two", "2026-11-29T02:00:00+00:00", "train.learning_rate=0.5")
    keep_steps(store, config_path, "b-three", "2026-11-29T03:00:00+00:00", "adapter.name=other")
    for run_id, loss in (("aa-one", 1.25), ("ab-two", 1.5)):
        measured = Measured(version="v1", metrics={"loss": loss, "exact_match": 0.75})
        runs.write(store, run_id, Evaluation(run_id=run_id, records=9, models={"candidate": measured}))
        used = USED if run_id == "aa-one" else None  # as an earlier release left it
        runs.write(store, run_id, TrainResult(version=f"v-{run_id}", version_uri="s3://b/v", steps=40, usage=used))
    decided = {"decision": "promote", "verdict": "promote", "adapter": "sums", "alias": "production", "reasons": ()}
    runs.write(store, "aa-one", Decision(run_id="aa-one", **decided))
    runs.write(store, "aa-one", TunedRate(learning_rate=0.25, prior=0.1))
    failed = StepRecord(step="finetune", status="failed", started_at="2026-11-29T03:01:00+00:00", seconds=1.0)
    runs.write(store, "b-three", failed)
    return ["b-three", "ab-two", "aa-one"]


def test_the_stores_runs_are_listed_newest_first_with_what_came_of_them(three, store, config_path, tmp_path):
    done = fineloop("runs", "list", "-c", config_path, "--json", cwd=tmp_path)
    listed = body(done)["runs"]
    assert sorted(run["run_id"] for run in listed) == sorted(three)
    of_sums = past_runs.listed(store, tmp_path, adapter="sums", limit=9)
    assert {run.run_id for run in of_sums} == {"aa-one", "ab-two"}
    assert len(past_runs.listed(store, tmp_path, limit=2)) == 2
    of = {run["run_id"]: run for run in listed}
    assert [of[run_id]["outcome"] for run_id in three] == ["failed in finetune", "trained", "promote"]
    assert [of[run_id]["learning_rate"] for run_id in ("aa-one", "ab-two")] == [0.25, 0.5]
    assert (of["aa-one"]["metrics"]["loss"], of["aa-one"]["steps"], of["aa-one"]["note"]) == (1.25, 40, "half the data")
    assert of["b-three"]["began"] == "2026-11-29T03:00:00+00:00"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("aa-one")]
    assert " ".join(line.split()[1:]) == "2026-11-29 01:00 sums promote 1.250 0.25 40 6.00 $41.28 half the data"


def test_a_run_is_shown_with_what_came_of_it_its_report_and_what_to_do_next(three, store, config_path, tmp_path):
    store.put(runs.run_key("aa-one", runs.REPORT), b"<p>its page</p>")
    folder = tmp_path / ".fineloop" / "runs" / "aa-one"
    folder.mkdir(parents=True)
    done = fineloop("runs", "show", "aa", "-c", config_path, "--json", cwd=tmp_path)
    shown = body(done)
    assert (shown["run_id"], shown["outcome"], shown["verdict"]) == ("aa-one", "promote", "promote")
    assert shown["report"] == ".fineloop/runs/aa-one/report.html"
    assert (folder / "report.html").read_text() == "<p>its page</p>"
    assert shown["steps"] == {"prepare": {"state": "succeeded", "seconds": 1.0}}
    assert shown["next"] == [
        "fineloop chat sums@v1",
        "fineloop adapters pull sums@v1 --with-base",
        "fineloop adapters serve-manifest sums@v1 --for vllm",
    ]
    for part in ("sums: a new version may go to production", shown["report"], shown["next"][0]):
        assert part in done.stderr
    listed = fineloop("runs", "list", "-c", config_path, "--json", cwd=tmp_path)
    assert [run["report"] for run in body(listed)["runs"] if run["report"]] == [shown["report"]]
    assert "reports at .fineloop/runs/RUN/report.html" in listed.stderr


def test_a_report_that_no_folder_here_has_is_named_by_its_address(three, store, tmp_path):
    store.put(runs.run_key("ab-two", runs.REPORT), b"")
    assert past_runs.one(store, tmp_path, "ab-two").report == store.uri("runs/ab-two/report.html")


@pytest.mark.parametrize(
    ("steps", "lock", "outcome"),
    [
        (["prepare", "report"], "", "interrupted in finetune"),
        (["prepare", "finetune", "evaluate", "report"], "retrain", "interrupted in gate"),
        (["report", "prepare"], "retrain", "interrupted in finetune"),
        (["prepare", "tune"], "sweep", "swept"),
        (["prepare"], None, "not past finetune"),
    ],
)
def test_a_run_that_came_to_no_decision_says_where_it_ended(steps, lock, outcome, store, config_path, tmp_path):
    keep_steps(store, config_path, "r", "2026-11-29T01:00:00+00:00")
    for second, step in enumerate(steps):
        began = f"2026-11-29T01:00:0{second}+00:00"
        runs.write(store, "r", StepRecord(step=step, status="succeeded", started_at=began, seconds=1.0))
    if lock is not None:
        (tmp_path / "runs" / "r").mkdir(parents=True)
        (tmp_path / "runs" / "r" / "lock").write_text(lock)
    assert past_runs.one(store, tmp_path, "r").outcome == outcome


def test_a_run_is_found_by_the_beginning_of_its_id_or_by_its_version(three, store, published):
    assert past_runs.find(store, "ab") == "ab-two"
    assert past_runs.find(store, f"sums@{published[0]}") == "run-one"
    with pytest.raises(UserError, match="2 runs begin with 'a', such as aa-one and ab-two"):
        past_runs.find(store, "a")
    with pytest.raises(UnknownName, match="no run 'zz'"):
        past_runs.find(store, "zz")


def test_a_note_on_the_command_line_is_a_key_of_the_config_and_stands_in_the_report(config_path: Path) -> None:
    said = 'half the "data" – a try\n'  # noqa: RUF001
    options = cli.parser().parse_args(["train", "-c", str(config_path), "--note", said, "--set", "train.epochs=2"])
    config = load_config(options)
    assert (config.adapter.note, config.train.epochs) == (said, 2)
    assert ("Note", said) in run_facts(RunFiles("r", "sums", note=config.adapter.note))


JUNK = {
    "not UTF-8": (runs.CONFIG, b"\xff\xfe"),
    "not TOML": (runs.CONFIG, b"[" * 100_000),
    "no section": (runs.CONFIG, b"adapter = 5"),
    "a text for a rate": (runs.CONFIG, b'[adapter]\nname = "sums"\n[train]\nlearning_rate = "high"'),
    "a broken decision": (runs.DECISION, b"{"),
    "nothing but junk": ("junk", b"x"),
}


@pytest.mark.parametrize("junk", JUNK)
def test_one_damaged_run_hides_no_other(three, store, config_path, tmp_path, junk):
    keep_steps(store, config_path, "odd", "2026-11-29T04:00:00+00:00")
    file, content = JUNK[junk]
    if file == "junk":
        store.delete([runs.run_key("odd", runs.CONFIG)])
    store.put(runs.run_key("odd", file), content)
    done = fineloop("runs", "list", "-c", config_path, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = {run["run_id"]: run["outcome"] for run in body(done)["runs"]}
    assert [listed.pop(run_id) for run_id in three] == ["failed in finetune", "trained", "promote"]
    assert all(outcome.startswith("damaged: ") for outcome in listed.values())
    assert len(listed) == (file != "junk")
    shown = fineloop("runs", "show", "odd", "-c", config_path, cwd=tmp_path)
    assert (shown.returncode, len(shown.stderr.splitlines())) == (2 if file == "junk" else 1, 1), shown.stderr
    if file == runs.CONFIG and junk != "a text for a rate":
        gone = fineloop("adapters", "gc", "-c", config_path, cwd=tmp_path)
        assert "Traceback" not in gone.stderr


def test_what_a_terminal_obeys_is_shown_and_not_sent(store, config_path, tmp_path):
    name = "\\u001b]0;pwn\\u0007\\u001b[2J\\u202e"
    store.put("runs/odd\x1b[2J/config.toml", f'[adapter]\nname = "{name}"\nnote = "a\\u009bb"'.encode())
    store.put("runs/bad/config.toml", b"\x1b[2J = 5")
    done = fineloop("runs", "list", "-c", config_path, cwd=tmp_path)
    shown = done.stdout + fineloop("runs", "show", "b", "-c", config_path, cwd=tmp_path).stderr
    assert "\\x1b]0;pwn\\x07\\x1b[2J\\u202e" in shown
    assert [each for each in shown if each != "\n" and not each.isprintable()] == []


RECORDS = 80


def columns(role: str, seed: int) -> dict[str, Any]:
    drawn = np.random.default_rng(seed)
    right = drawn.random(RECORDS) < 0.4 + 0.2 * seed
    return {
        f"{role}_nll": drawn.gamma(2.0, 1.5 - 0.3 * seed, RECORDS),
        f"{role}_exact_match": right.astype(float),
        f"{role}_answer": [f"answer {place}" if each else "no" for place, each in enumerate(right)],
    }


def keep(store: Store, run_id: str, config: str, versions: dict[str, str], of: dict[str, Any], order: Any) -> None:
    """A run that compared these versions, by role; its records lie in this order."""
    models = {"base": Measured(metrics={"loss": 9.0, "exact_match": 0.0})}
    for role, version in versions.items():
        loss = float(of[f"{role}_nll"].sum() / sum(of["answer_tokens"]))
        metrics = {"loss": loss, "exact_match": float(of[f"{role}_exact_match"].mean())}
        models[role] = Measured(version=version, metrics=metrics)
    sink = io.BytesIO()
    pq.write_table(pa.table(of).take(order), sink)
    behind = hashlib.sha256(sink.getvalue()).hexdigest()
    store.put(runs.run_key(run_id, runs.EVALUATION_RECORDS), sink.getvalue())
    store.put(runs.run_key(run_id, runs.CONFIG), config.encode())
    runs.write(store, run_id, Evaluation(run_id=run_id, records=RECORDS, models=models, records_sha256=behind))
    curve = [{"kind": "train", "step": step, "loss": 3 / step} for step in range(1, 9)]
    curve.append({"kind": "eval", "step": 8, "loss": 0.5})
    store.put(runs.run_key(run_id, runs.METRICS), "".join(json.dumps(each) + "\n" for each in curve).encode())


def two_runs(store: Store, config_path: Path, *, grouped: bool = False) -> None:
    """run-one, and run-two, whose champion was run-one's candidate; run-one's records lie in another order."""
    shared: dict[str, Any] = {
        "id": [str(place) for place in range(RECORDS)],
        "prompt": [json.dumps([["user", f"question <{place}>"]]) for place in range(RECORDS)],
        "reference": [f"answer {place}" for place in range(RECORDS)],
        "answer_tokens": [1 + place % 5 for place in range(RECORDS)],
        **({"group": [str(place // 2) for place in range(RECORDS)]} if grouped else {}),
    }
    ours, theirs = columns("candidate", 2), columns("champion", 1)
    first = {name.replace("champion", "candidate"): values for name, values in theirs.items()}
    one, two = (
        config_file.dumps(config_file.load(config_path, [f"train.epochs={epochs}", f"adapter.note={note}"]))
        for epochs, note in ((1, "one"), (3, "two"))
    )
    order = np.random.default_rng(0).permutation(RECORDS)
    keep(store, "run-one", one, {"candidate": "v1"}, shared | first, order)
    keep(store, "run-two", two, {"champion": "v1", "candidate": "v2"}, shared | ours | theirs, np.arange(RECORDS))


def sides(store: Store) -> list[past_runs.Side]:
    return [past_runs.read_side(store, run_id) for run_id in ("run-one", "run-two")]


@pytest.mark.parametrize(("metric", "grouped"), [("loss", False), ("loss", True), ("exact_match", False)])
def test_the_bounds_are_those_that_the_gate_decided_by(metric, grouped, store, config_path):
    two_runs(store, config_path, grouped=grouped)
    evaluation = runs.read(store, "run-two", Evaluation)
    found = past_runs.compare(*sides(store))
    asked = GateConfig(metric=metric, better_than_base_by=0, worse_than_champion_by=0.1, min_records=2)
    decision = policy.decide(evaluation, read_evidence(store, evaluation), asked, AdapterConfig(name="sums"))
    (rule,) = [each for each in decision.rules if each.name == "not_worse_than_champion"]
    gain = found.gains[metric]
    assert (gain.gain, gain.lower, gain.upper) == (rule.gain, rule.lower, rule.upper)
    assert (found.records, found.confidence) == (RECORDS, rule.confidence)


def test_screen_json_and_page_say_what_differs_and_what_turned(store: Store, config_path: Path, tmp_path: Path) -> None:
    two_runs(store, config_path)
    arguments = ("compare", "run-o", "run-two", "-c", config_path, "--html", "out.html", "--json")
    done = fineloop(*arguments, cwd=tmp_path)
    printed = body(done)
    assert printed["config"] == {"train.epochs": [1.0, 3.0]}
    assert [run["note"] for run in printed["runs"]] == ["one", "two"]
    (against,) = printed["against_first"]
    before, after = (columns("candidate", seed)["candidate_exact_match"] for seed in (1, 2))
    turned = {str(place): bool(now) for place, (was, now) in enumerate(zip(before, after, strict=True)) if was != now}
    assert {each["id"]: each["is_right"] for each in against["turned"]} == turned
    right = sum(turned.values())
    assert f"{right} turned right, {len(turned) - right} wrong" in done.stderr
    page = (tmp_path / "out.html").read_text()
    assert "question &lt;" in page
    assert "question <" not in page
    assert f"{right} records turned right and {len(turned) - right} wrong, of {RECORDS}" in page
    assert page.count("<circle") >= 4  # a held-out loss and an interval's middle of each
    assert page.count("<script") == page.count(f"<script>{SEARCH}</script>") == 1

    done = fineloop("compare", "run-two", "run-two", "run-one", "-c", config_path, cwd=tmp_path)
    assert "run-two and run-two are the same version, v2\n" in done.stdout
    assert done.stdout.count(" turned right, ") == 1


def test_runs_without_a_common_record_or_an_evaluation_are_refused(store: Store, config_path: Path) -> None:
    two_runs(store, config_path)
    first, other = sides(store)
    ids = pa.array([f"x{place}" for place in range(RECORDS)])
    elsewhere = other.records.set_column(0, "id", ids)
    with pytest.raises(DataError, match="run-one and run-two were measured on no common record"):
        past_runs.compare(first, replace(other, records=elsewhere))
    store.put(runs.run_key("bare", runs.CONFIG), b"")
    with pytest.raises(UserError, match="run bare evaluated nothing"):
        past_runs.read_side(store, "bare")


def test_losses_of_other_tokens_are_not_compared(store: Store, config_path: Path) -> None:
    two_runs(store, config_path)
    first, other = sides(store)
    twice = pa.array([2 * count for count in other.records.column("answer_tokens").to_pylist()])
    place = other.records.column_names.index("answer_tokens")
    longer = other.records.set_column(place, "answer_tokens", twice)
    found = past_runs.compare(first, replace(other, records=longer))
    assert set(found.gains) == {"exact_match"}


@pytest.fixture
def trained(stub_cluster: JobsApi, make_config: Callable[..., RunConfig], tmp_path: Path) -> str:
    outcome = run(make_config(), Place(tmp_path / "first", io.StringIO()), what="train")
    assert outcome.version
    return outcome.version


@pytest.mark.slow
def test_a_version_is_trained_again_on_its_dataset_though_its_sources_are_gone(
    trained: str, store: Store, config_path: Path, data_path: Path, tmp_path: Path
) -> None:
    data_path.unlink()
    done = fineloop("reproduce", f"sums@{trained}", "-c", config_path, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = body(done)
    assert (printed["reproduced_as"], printed["same"], printed["agrees"]) == (trained, True, True)
    assert "reproduced, byte by byte" in done.stderr
    first = read_lineage(store, resolve(store, f"sums@{trained}"))
    again = runs.read(store, printed["run_id"], TrainResult)
    assert again.dataset_uri == first["dataset"]["uri"]
    assert b"reproduces sums@" in store.get(runs.run_key(printed["run_id"], runs.CONFIG))
    other = fineloop(
        *("reproduce", f"sums@{trained}", "-c", config_path, "--set", "train.weight_decay=1.25", "--json"), cwd=tmp_path
    )
    assert other.returncode == 1, other.stderr
    found = body(other)
    assert (found["same"], found["agrees"]) == (False, False)
    gain = found["compared"]["gains"]["loss"]
    assert (gain["gain"], gain["upper"]) == (-0.25, -0.25)


def test_what_the_recipe_lacks_or_does_not_allow_is_said_before_anything_runs(store, make_config):
    records = [Record(str(place), [Message("user", f"question {place}")], "answer") for place in range(9)]
    dataset = datasets.publish(store, train=records[:6], evaluation=records[6:])
    config = make_config()
    lineage = {
        "config": make_config("train.start_from=production", "tune.when=always").model_dump(mode="json"),
        "dataset": {"uri": dataset.uri},
        "base": {"identity": {"commit": "c" * 40}},
        "parents": [f"{dataset.uri}/", store.uri("adapters/sums/versions/v1")],
    }
    files = {"adapter_model.safetensors": b"one", "adapter_config.json": b"{}"}
    version = publish_version(store, "sums", files, lineage=lineage)
    made = recipe_of(store, version, config, [], note="again").config
    assert (made.adapter.note, made.tune.when, made.model.revision) == ("again", "never", "c" * 40)
    assert made.train.start_from == "sums@v1"  # whatever is in production by now
    with pytest.raises(ConfigError, match=r"measured by my\.module:metric"):
        recipe_of(store, version, config, ['evaluate.metrics=["my.module:metric"]'], note="")
    erase(store, "1", by="ann")
    erase(store, "8", by="ann")
    with pytest.raises(
        DataError, match=rf"sums {version.version} cannot be reproduced: .* holds 2 records that were era"
    ):
        recipe_of(store, version, config, [], note="")
    store.delete([info.key for info in store.list(f"{store.key(dataset.uri).rstrip('/')}/")])
    with pytest.raises(ObjectMissing, match=f"which sums {version.version} was trained on, is gone"):
        recipe_of(store, version, config, [], note="")
