"""`fineloop runs list` without a Kubeflow: the store's runs, from the records that their steps left."""

from pathlib import Path

import pytest

from components.config import config_file
from components.records import runs
from components.records.steps import Decision, Evaluation, Measured, StepRecord, TrainResult, Usage
from components.records.sweep import TunedRate
from components.report.run_files import RunFiles
from components.report.sections import run_facts
from components.shared.errors import UnknownName, UserError
from components.store.store import Store
from pipelines import cli
from pipelines.commands.arguments import load_config
from pipelines.local import past_runs
from tests.pipelines.command_line import body, fineloop

pytestmark = pytest.mark.usefixtures("forked")


def keep(store: Store, config_path: Path, run_id: str, began: str, *overrides: str) -> None:
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
    keep(store, config_path, "aa-one", "2026-11-29T01:00:00+00:00", 'adapter.note="half the data"')
    keep(store, config_path, "ab-two", "2026-11-29T02:00:00+00:00", "train.learning_rate=0.5")
    keep(store, config_path, "b-three", "2026-11-29T03:00:00+00:00", "adapter.name=other")
    for run_id, loss in (("aa-one", 1.25), ("ab-two", 1.5)):
        measured = Measured(version="v1", metrics={"loss": loss, "exact_match": 0.75})
        runs.write(store, run_id, Evaluation(run_id=run_id, records=9, models={"candidate": measured}))
        used = USED if run_id == "aa-one" else None  # as an earlier release left it
        runs.write(store, run_id, TrainResult(version=f"v-{run_id}", version_uri="s3://b/v", steps=40, usage=used))
    decided = Decision(
        decision="promote", verdict="promote", adapter="sums", alias="production", run_id="aa-one", reasons=()
    )
    runs.write(store, "aa-one", decided)
    runs.write(store, "aa-one", TunedRate(learning_rate=0.25, prior=0.1))
    failed = StepRecord(step="finetune", status="failed", started_at="2026-11-29T03:01:00+00:00", seconds=1.0)
    runs.write(store, "b-three", failed)
    return ["b-three", "ab-two", "aa-one"]


def test_the_stores_runs_are_listed_newest_first_with_what_came_of_them(
    three: list[str], store: Store, config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
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


def test_a_run_is_shown_with_what_came_of_it_its_report_and_what_to_do_next(
    three: list[str], store: Store, config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
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
    keep(store, config_path, "r", "2026-11-29T01:00:00+00:00")
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
def test_one_damaged_run_hides_no_other(three, store, config_path, tmp_path, monkeypatch, junk):
    keep(store, config_path, "odd", "2026-11-29T04:00:00+00:00")
    file, content = JUNK[junk]
    if file == "junk":
        store.delete([runs.run_key("odd", runs.CONFIG)])
    store.put(runs.run_key("odd", file), content)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
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


def test_what_a_terminal_obeys_is_shown_and_not_sent(store, config_path, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    name = "\\u001b]0;pwn\\u0007\\u001b[2J\\u202e"
    store.put("runs/odd\x1b[2J/config.toml", f'[adapter]\nname = "{name}"\nnote = "a\\u009bb"'.encode())
    store.put("runs/bad/config.toml", b"\x1b[2J = 5")
    done = fineloop("runs", "list", "-c", config_path, cwd=tmp_path)
    shown = done.stdout + fineloop("runs", "show", "b", "-c", config_path, cwd=tmp_path).stderr
    assert "\\x1b]0;pwn\\x07\\x1b[2J\\u202e" in shown
    assert [each for each in shown if each != "\n" and not each.isprintable()] == []
