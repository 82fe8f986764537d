"""The pipeline under kfp.local: real steps, a real store; the Ray jobs are stubs that keep the contract."""

import contextlib
import io
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from components.config import config_file
from components.config.schema import TRACKER_SECRETS_FILE, RunConfig
from components.handover.announce import signature
from components.records import runs
from components.records.steps import Decision
from components.records.sweep import RateLoss, SweepResult, Tuned, TunedRate
from components.registry import aliases, event_log, signing, versions
from components.registry.audit import audit
from components.registry.event_log import events
from components.report.registry_page import write_pages
from components.report.report import PAGES_FROM_RUN, build_report
from components.report.run_files import RunFiles
from components.shared.errors import ConfigError, DataError, IntegrityError, UserError
from components.shared.protocol import Line
from components.store.store import Store
from pipelines.configs import DEFAULT_CONFIG
from pipelines.local.display import Display
from pipelines.local.past_runs import own_config
from pipelines.local.run import Finished, Outcome, Place, apply, changes, read_outcome, run, summary, sweep, sweep_lines
from tests.doubles.http_server import serving
from tests.doubles.jobs_api import JobsApi
from tests.pipelines.command_line import pem, production, publish_sums, sums

pytestmark = pytest.mark.usefixtures("forked")

RUN_KEYS = {
    *("run_id", "adapter", "version", "version_uri", "decision", "verdict", "promoted", "reasons", "metrics"),
    *("report", "store", "timings_s"),
}

NO_GPU = r"ray.*asks for a GPU.*(Ray sees none|this machine has)"


@pytest.fixture
def terminal() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def place(tmp_path: Path, terminal: io.StringIO) -> Place:
    return Place(tmp_path / "home", terminal)


def test_a_good_candidate_is_promoted_and_a_worse_one_held(stub_cluster, store, make_config, place, terminal):
    deaf = "announce.webhook=http://127.0.0.1:9/"
    first = run(make_config(deaf), place, what="retrain")
    screen = terminal.getvalue()
    assert "Connection refused" in first.as_json()["untold"]["webhook"]
    home = Path(".fineloop")
    assert "`fineloop adapters announce sums@production` notifies it again" in summary(first, home=home)
    second = run(make_config(deaf, "train.weight_decay=1.5"), place, what="retrain")
    assert "Connection refused" in second.untold["webhook"]
    assert "announce.webhook was not notified of how this run ended: " in summary(second, home=home)
    assert (first.decision, first.promoted) == ("promote", True)
    assert (second.decision, second.promoted) == ("hold", False)
    assert production(store) == first.version
    kinds = [event.kind for event in event_log.events(store, "sums")]
    assert kinds == ["published", "promoted", "published", "refused"]
    check_outcome(replace(first, untold={}), champion=None)
    check_outcome(replace(second, untold={}), champion=1.0)
    check_what_a_person_sees(screen, place.home / "runs" / first.run_id / "pipeline.log")
    assert summary(second, home=home).count(f"fineloop chat sums@{second.version}") == 1
    assert "fineloop adapters rollback" not in summary(first, home=home)  # nothing held the alias before
    decided = first.files.decision
    assert decided is not None
    before = replace(first.files, decision=decided.model_copy(update={"champion": "v1"}))
    text = summary(replace(first, files=before), home=Path("x"), program="bin/fineloop")
    new = f"sums@{first.version}"
    for command in ("rollback sums", f"pull {new} --with-base", f"serve-manifest {new} --for vllm"):
        assert f"bin/fineloop adapters {command} --home x" in text


def test_where_keys_are_trusted_a_job_of_its_own_compares_and_a_training_cannot_promote_itself(
    stub_cluster: JobsApi,
    store: Store,
    make_config: Callable[..., RunConfig],
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions_key, evaluations_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    for name, key in (("FINELOOP_SIGNING_KEY", versions_key), ("FINELOOP_EVALUATION_KEY", evaluations_key)):
        monkeypatch.setenv(name, pem(key))
    store.trusted_keys, store.evaluation_keys = ((signing.public_text(key),) for key in (versions_key, evaluations_key))
    keys = [f"registry.{name}={json.dumps(getattr(store, name))}" for name in ("trusted_keys", "evaluation_keys")]
    with pytest.raises(ConfigError, match=r"registry\.evaluation_keys are not, so no evaluation could be believed"):
        run(make_config(keys[0]), place, what="retrain")
    assert stub_cluster.jobs == {}
    first = run(make_config(*keys), place, what="retrain")
    forging = run(make_config(*keys, "train.weight_decay=1.5", "method.dropout=0.4"), place, what="retrain")
    assert (first.decision, forging.decision, forging.promoted) == ("promote", "hold", False)
    jobs = [job.rpartition("-")[0].rpartition("-")[2] for job in stub_cluster.jobs]
    assert jobs == ["candidate", "evaluate"] * 2
    assert store.get_json(f"runs/{forging.run_id}/decision.json")["decision"] == "promote"
    assert not any(store.exists(f"runs/{first.run_id}/{file}") for file in runs.APART)
    pointer = aliases.read_alias(store, "sums", "production")
    assert pointer.version == first.version
    assert audit(store, "sums").findings == ()
    monkeypatch.delenv("FINELOOP_EVALUATION_KEY")
    with pytest.raises(IntegrityError, match=r"signed by none of registry\.evaluation_keys, so nothing is decided on"):
        run(make_config(*keys, "train.weight_decay=0.5", "method.dropout=0.4"), place, what="retrain")
    assert aliases.read_alias(store, "sums", "production") == pointer


def check_outcome(outcome: Outcome, *, champion: float | None) -> None:
    body = json.loads(json.dumps(outcome.as_json()))
    assert body.keys() == RUN_KEYS
    assert body["metrics"].keys() == {"base", "champion", "candidate"}
    assert (body["metrics"]["champion"] or {}).get("loss") == champion
    assert body["version_uri"].endswith(f"/adapters/sums/versions/{body['version']}")
    end = "promote" if body["promoted"] else "hold"
    steps = ["ground", "prepare", "finetune", "evaluate", "gate", end, "report", "total"]
    assert list(body["timings_s"]) == steps
    assert sum(body["timings_s"][step] for step in steps[:-1]) <= body["timings_s"]["total"]
    assert body["reasons"]
    assert body["run_id"] in Path(body["report"]).read_text()


def check_what_a_person_sees(screen: str, log_path: Path) -> None:
    assert all(line.startswith("[") for line in screen.splitlines())
    assert "[finetune] 1/2" in screen
    assert "KFP" not in screen
    assert "KFP Executor" in log_path.read_text()
    finished = [line.split("]")[0][1:] for line in screen.splitlines() if "] finished in" in line]
    assert finished == ["servers", "prepare", "finetune", "evaluate", "gate", "promote", "report"]


@pytest.mark.slow
def test_a_trackers_secret_lies_in_a_private_file_of_the_run_for_as_long_as_it_goes_on(
    stub_cluster: JobsApi, make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, str]] = []

    class Looking(io.StringIO):
        """A terminal that looks for the file whenever it is written to."""

        def write(self, text: str) -> int:
            for path in (tmp_path / "home").rglob(TRACKER_SECRETS_FILE):
                where = str(path.relative_to(tmp_path / "home/runs"))
                with contextlib.suppress(FileNotFoundError):  # its job has ended meanwhile
                    seen.append((where, path.stat().st_mode & 0o777, path.read_text()))
            return super().write(text)

    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, f"secret of {name}")
    tracking = make_config("track.wandb=team/sums")
    run(tracking, Place(tmp_path / "home", Looking()), what="train", run_id="run-1")
    assert set(seen) == {(f"run-1/{TRACKER_SECRETS_FILE}", 0o600, '{"WANDB_API_KEY": "secret of WANDB_API_KEY"}')}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret of" in path.read_bytes()]


def test_training_alone_publishes_and_leaves_the_alias_by_an_explicit_address_and_without_a_gate(
    stub_cluster: JobsApi, store: Store, make_config: Callable[..., RunConfig], place: Place, monkeypatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    there = Place(place.home, place.terminal, address=stub_cluster.address)
    outcome = run(make_config("gate.min_records=60"), there, what="train")
    assert len(stub_cluster.jobs) == 1
    assert production(store) is None
    assert [version.version for version in versions.list_versions(store, "sums")] == [outcome.version]
    assert outcome.as_json().keys() == RUN_KEYS - {"decision", "verdict", "promoted", "reasons", "report"}
    assert outcome.metrics["candidate"] is not None
    assert "adapters promote sums@" in summary(outcome, home=Path(".fineloop"))


@pytest.mark.parametrize(
    ("keys", "elsewhere", "run_id", "error", "message"),
    [
        (["ray.cluster.kind=rayjob"], {"address": "http://127.0.0.1:9"}, "", UserError, "Drop --address"),
        ([], {}, "..", UserError, "run_id .*: takes letters"),
        ([], {}, "-x", UserError, "run_id .*: takes letters"),
        # No machine has so many.
        (["ray.use_gpu=true", "ray.num_workers=1024", "train.batch_size=8192"], {}, "", ConfigError, NO_GPU),
    ],
    ids=["an address where each job has a cluster of its own", "no name", "an option for a name", "a GPU that is away"],
)
def test_what_no_run_can_begin_with_is_said_before_anything_starts_or_has_a_folder(
    make_config, place, monkeypatch, keys, elsewhere, run_id, error, message
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(error, match=message):
        run(make_config(*keys), replace(place, **elsewhere), what="train", run_id=run_id)
    assert not place.home.exists()


def test_a_night_that_holds_or_fails_is_told_of_once_and_signed_in_the_reporting_step(
    stub_cluster: JobsApi,
    make_config: Callable[..., RunConfig],
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FINELOOP_WEBHOOK_SECRET", "hush")
    got: list[tuple[str, str, str]] = []

    def hear(_verb: str, _path: str, _query: object, body: bytes, headers: Mapping[str, str]) -> tuple[int, object]:
        assert headers["X-Hub-Signature-256"] == signature(body, "hush")
        got.append((headers["X-Fineloop-Event"], json.loads(body)["run_id"], json.loads(body).get("reason", "")))
        return 200, {}

    with serving(hear) as url:
        told = f"announce.webhook={url}"
        assert run(make_config(told), place, what="retrain", run_id="first").promoted
        held = run(make_config(told, "train.weight_decay=1.5"), place, what="retrain", run_id="second")
        for _ in range(2):
            with pytest.raises(DataError, match="every answer is empty"):
                run(make_config(told, "method.dropout=0.1"), place, what="retrain", run_id="third")
    assert [heard[:2] for heard in got] == [("promoted", "first"), ("held", "second"), ("failed", "third")]
    assert got[1][2] == " ".join(held.reasons)
    assert "every answer is empty" in got[2][2]
    assert "untold" not in held.as_json()


def test_a_users_mistake_inside_a_ray_job_is_a_users_mistake_outside(stub_cluster, store, make_config, place):
    with pytest.raises(DataError, match="every answer is empty") as caught:
        run(make_config("method.dropout=0.1"), place, what="retrain")
    note, report = caught.value.__notes__
    assert note.startswith("step finetune; log: ")
    assert Path(note.rpartition(": ")[2]).is_file()
    page = Path(report.removeprefix("report: ")).read_text()
    assert "the finetune step failed" in page
    assert "every answer is empty" in page
    assert versions.list_adapters(store) == []


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data.source=/nowhere.jsonl", r"nowhere\.jsonl"),
        ("gate.min_records=60", r"are left for the gate to decide on, and gate\.min_records asks for 60"),
    ],
)
def test_data_that_no_run_can_do_with_are_refused_before_any_ray_job(stub_cluster, make_config, place, key, message):
    with pytest.raises(DataError, match=message):
        run(make_config(key), place, what="retrain")
    assert stub_cluster.jobs == {}


@pytest.mark.slow
def test_a_run_that_finds_nothing_new_is_skipped(stub_cluster, store, make_config, place, data_path):
    config = make_config("data.min_new_records=5")
    first = run(config, place, what="retrain")
    skipped = run(config, place, what="retrain")
    assert first.promoted
    assert (skipped.decision, skipped.promoted, skipped.version) == ("skipped", False, None)
    assert skipped.as_json().keys() == RUN_KEYS
    assert skipped.metrics == {"base": None, "champion": None, "candidate": None}
    assert skipped.reasons == [f"nothing new since run {first.run_id}, which read {data_path}"]
    assert list(skipped.timings_s) == ["ground", "prepare", "skip", "report", "total"]
    assert len(stub_cluster.jobs) == 1
    assert run(config, place, what="train").version  # who asks for a training gets one
    assert len(stub_cluster.jobs) == 2
    assert "data.min_new_records=0" in summary(skipped, home=Path(".fineloop"))
    assert "there is too little new to train on" in Path(str(skipped.report)).read_text()
    data_path.write_text(sums(0, 65))
    assert run(make_config("data.min_new_records=5", "train.weight_decay=0.5"), place, what="retrain").promoted


@pytest.mark.slow
@pytest.mark.parametrize("num_jobs", [0, 1], ids=["on a head that starts anew", "on the same head"])
def test_a_repeated_run_id_repeats_nothing(stub_cluster, store, make_config, place, num_jobs):
    first = run(make_config(), place, what="retrain", run_id="again")
    if num_jobs == 0:
        stub_cluster.jobs.clear()
    second = run(make_config(), place, what="retrain", run_id="again")
    assert (first.promoted, second.promoted, second.decision) == (True, True, "promote")
    assert second.version == first.version
    assert len(stub_cluster.jobs) == 1
    assert [event.kind for event in event_log.events(store, "sums")] == ["published", "promoted"]


def test_a_report_on_this_machine_has_the_pages_that_it_links_to_beside_it(store, tmp_path, make_config):
    about = {"adapter": "sums", "alias": "production", "run_id": "r", "reasons": ()}
    runs.write(store, "r", Decision(decision="skipped", **about))
    report = build_report(RunFiles(run_id="r", adapter="sums"), pages_at=PAGES_FROM_RUN)
    store.put("runs/r/report.html", report.encode())
    write_pages(store, "sums", generated_at="now")
    store.put("pages/sums.html", b"its versions")
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    (tmp_path / "pages").mkdir(mode=0o755)  # as an earlier release left it
    read_outcome(make_config(), Finished(store, "r", folder, 0, 0), is_decided=True)
    links = re.findall(r'href="(\.\./[^"]+)"', (folder / "report.html").read_text())
    assert [(folder / link).resolve().name for link in links] == ["sums.html", "index.html"]
    assert all((folder / link).is_file() for link in links)
    assert (tmp_path / "pages").stat().st_mode & 0o777 == 0o700


BEST = Tuned(
    method="qlora", rank=16, batch_size=16, prior=1e-3, learning_rate=3.16e-3, loss=1.0, is_inside=True,
    rates=[RateLoss(learning_rate=3.16e-3, loss=1.0, statuses=["finished"])],
)  # fmt: skip


def test_applying_changes_the_rate_and_not_a_byte_else(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(DEFAULT_CONFIG.read_text())
    assert apply(path, config_file.load(path), BEST) == {"train.learning_rate": 3.16e-3}
    assert path.read_text() == DEFAULT_CONFIG.read_text().replace("learning_rate = 1e-3", "learning_rate = 0.00316")
    assert apply(path, config_file.load(path), BEST) == {}
    dora = BEST.model_copy(update={"method": "dora"})
    assert changes(config_file.load(DEFAULT_CONFIG), dora) == {"method.name": "dora", "train.learning_rate": 3.16e-3}


@pytest.mark.parametrize(
    "train",
    [
        "[train]\nlearning_rate = 1e-3 # tuned by hand\nepochs = 2\n",
        "[train] # how\nepochs = 2\n[ray]\nnum_workers = 2\n",
        "[train]\nepochs = 2",
        "",
        "train = {epochs = 2, learning_rate = 1e-3}\n",
        "train.epochs = 2\n",
    ],
)
def test_the_rate_is_set_however_its_section_is_written(train: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    others = 'adapter = {name = "x"} # whose\nmodel.base = "b"\ndata = {source = "d"}\n'
    path.write_text(others + train)
    before = tomllib.loads(path.read_text())
    apply(path, config_file.load(path), BEST)
    after = tomllib.loads(path.read_text())
    assert after.pop("train") == {**before.pop("train", {}), "learning_rate": 3.16e-3}
    assert after == before
    assert path.read_text().count("#") == (others + train).count("#")


def test_trials_are_aligned_rows_above_the_steps_line_and_say_whole_why_one_failed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    display = Display(stream, live=True)
    display.start("tune")
    why = "after 2 steps the validation loss is 11.4, and 8.395 at its start"
    display.line(Line("tune", "| qlora 16 16 0.00316 0 1.2345 32/32 finished in 1 min 02 s"))
    display.line(Line("tune", f"| qlora 16 16 0.01 0 - 2/8 diverged in 6.3 s: {why}"))
    display.line(Line("tune", f"1/5 trials, about 45 s left; {why}"))
    *_, first, row, live = stream.getvalue().split("\n")
    assert row.endswith(why)
    rows = [text.rpartition("\x1b[2K")[2] for text in (first, row)]
    assert rows[0].index("finished") == rows[1].index("diverged")
    assert rows[0].index("0.00316") + 7 == rows[1].index("0.01") + 4
    assert len(live.rpartition("\r")[2]) < 60 + len("\x1b[2K\x1b[36m\x1b[0m")


def test_a_sweep_here_is_shown_as_it_goes_and_leaves_its_record_and_picture(stub_cluster, make_config, place, terminal):
    result = sweep(make_config(), place, run_id="s1")
    prior = make_config().learning_rate
    assert (result.best.learning_rate, result.best.is_inside) == (10 * prior, True)
    assert "0.002     0    1.5000        4/4  finished in 3 s" in terminal.getvalue()
    folder = place.home / "runs" / "s1"
    assert SweepResult.from_json((folder / "sweep.json").read_bytes(), "sweep.json") == result
    assert (folder / "sweep.svg").read_text().startswith("<svg")
    lines = list(sweep_lines(result))
    assert lines[-1] == "a verdict"
    assert [line.split()[0] for line in lines[1:4]] == [f"{prior:.3g}", "*", f"{100 * prior:.3g}"]


@pytest.mark.slow
def test_a_run_that_tunes_remembers_its_rate_for_the_next(stub_cluster, store, make_config, tmp_path):
    config = make_config("tune.when=no_prior_sweep")
    for run_id in ("first", "second"):
        terminal = io.StringIO()
        run(config, Place(tmp_path / "home", terminal), what="train", run_id=run_id)
        assert runs.read(store, run_id, TunedRate).learning_rate == 10 * config.learning_rate
        assert "which the sweep of run first found" in terminal.getvalue()
        assert [step.step for step in runs.steps(store, run_id)] == ["prepare", "tune", "finetune", "evaluate"]
    assert runs.find(store, "second", SweepResult) is None


def newer(folder: Path, first: int, count: int) -> str:
    path = folder / f"from-{first}.jsonl"
    path.write_text(sums(first, first + count))
    return str(path)


def registry_of(store: Store) -> list[str]:
    return [f"--set=registry.{key}={json.dumps(getattr(store, key))}" for key in ("bucket", "prefix")]


@pytest.fixture
def two(forked: None, stub_cluster: JobsApi, store: Store, make_config: Any, place: Place) -> list[str]:
    """Versions with a loss of 0.5 and 0.9; the worse one is in production, put there by hand."""
    made = [str(run(make_config(f"train.weight_decay={loss}"), place, what="train").version) for loss in (0.5, 0.9)]
    for version in made:
        aliases.promote(store, "sums", version)
    return made


def test_production_that_is_worse_is_said_to_be_and_goes_back_where_that_is_asked(
    two: list[str], store: Store, config_path: Path, stub_cluster: JobsApi, tmp_path: Path, printed: Callable[..., Any]
) -> None:
    where = ["--home", str(tmp_path / "home"), *registry_of(store)]
    # Without -c the config is that of production's own run, whose data has nothing new.
    nothing = printed("adapters", "check", "sums", *where)
    assert "verdict" not in nothing
    jobs = len(stub_cluster.jobs)

    look = printed("adapters", "check", "sums", "--data", newer(tmp_path, 100, 40), *where)
    assert (look["version"], look["against"], look["verdict"], look["records"]) == (two[1], two[0], "worse", 40)
    assert (look["can_roll_back"], look["moved"]) == (True, None)
    assert look["fresh"] == pytest.approx(0.9)
    assert len(stub_cluster.jobs) == jobs + 1
    kinds = [event.kind for event in events(store, "sums")]

    same = printed("adapters", "check", "sums", "--data", newer(tmp_path, 100, 40), *where)
    said = ("verdict", "gain", "lower", "upper", "records")
    assert [same[key] for key in said] == [look[key] for key in said]
    assert same["new_records"] == 0
    assert [event.kind for event in events(store, "sums")] == kinds

    base = printed("adapters", "check", "sums", "--data", newer(tmp_path, 100, 40), "--against", "base", *where)
    assert (base["verdict"], base["against"], base["new_records"]) == ("still better", "base", 40)

    taken_back = ["--set", "check.roll_back=true", "-c", str(config_path), *where[:2]]
    back = printed("adapters", "check", "sums", "--data", newer(tmp_path, 200, 40), "--worse-by", "0.05", *taken_back)
    assert (back["verdict"], back["records"], back["moved"]["to"]) == ("worse", 80, two[0])
    pointer = aliases.read_alias(store, "sums", "production")
    assert (pointer.version, pointer.kind) == (two[0], "rolled_back")
    assert audit(store, "sums").findings == ()
    # The old version's look begins anew, against its base, as nothing was in production before it.
    assert printed("adapters", "check", "sums", "--data", newer(tmp_path, 100, 40), *where)["against"] == "base"


def test_a_mistake_is_said_before_any_cluster_is_asked(stub_cluster, published, tmp_path, answer):
    for words, message in (
        (["others"], "is of the adapter sums, not of others"),
        (["sums", "--worse-by", "much"], "check.worse_by"),
        (["sums", "--against", "v00000000"], "v00000000"),
        (["sums", "--against", published[0]], "name another version"),
    ):
        refused = answer("adapters", "check", *words, "--home", str(tmp_path / "home"), exit_code=2)
        assert message in refused["error"]["message"]
    assert stub_cluster.jobs == {}


def test_production_brings_no_cluster_and_no_image_to_run_in(store, make_config, tmp_path, printed):
    elsewhere = make_config("ray.cluster.kind=rayjob", "ray.cluster.image=registry.example/theirs:1")
    version = publish_sums(store, "weights", run_id="theirs", config=config_file.as_table(elsewhere))
    aliases.promote(store, "sums", version)
    refused = printed("adapters", "check", "sums", *registry_of(store), "--home", str(tmp_path / "home"), exit_code=2)
    assert "another cluster" in refused["error"]["message"]


def test_the_config_of_productions_own_run_allows_no_code_that_ours_does_not(make_config: Any) -> None:
    lineage = {"config": config_file.as_table(make_config("model.trust_remote_code=true"))}
    with pytest.raises(ConfigError, match="comes with Python code of its own"):
        own_config(lineage, make_config(), [], origin="lineage")
    allowed = own_config(lineage, make_config("model.trust_remote_code=true"), ["check.worse_by=0.3"], origin="lineage")
    assert (allowed.model.trust_remote_code, allowed.check.worse_by) == (True, 0.3)
