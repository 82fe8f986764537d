"""The pipeline under kfp.local: real steps, a real store; the Ray jobs are stubs that keep the contract."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from components.config.schema import TRACKER_SECRETS_FILE, RunConfig
from components.records import runs
from components.registry import aliases, event_log, signing, versions
from components.registry.audit import audit
from components.shared.errors import ConfigError, DataError, IntegrityError, JobError, UserError
from components.store.store import Store
from pipelines.local.run import Outcome, Place, run, summary
from tests.doubles.jobs_api import JobsApi

RUN_KEYS = {
    "run_id",
    "adapter",
    "version",
    "version_uri",
    "decision",
    "verdict",
    "promoted",
    "reasons",
    "metrics",
    "report",
    "store",
    "timings_s",
}


@pytest.fixture
def terminal() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def place(tmp_path: Path, terminal: io.StringIO) -> Place:
    return Place(tmp_path / "home", terminal)


def test_a_good_candidate_is_promoted_and_a_worse_one_held(
    stub_cluster: JobsApi,
    store: Store,
    make_config: Callable[..., RunConfig],
    place: Place,
    terminal: io.StringIO,
) -> None:
    first = run(make_config("announce.webhook=http://127.0.0.1:9/"), place, what="retrain")
    screen = terminal.getvalue()
    assert "Connection refused" in first.as_json()["untold"]["webhook"]
    assert "`fineloop adapters announce sums@production` notifies it again" in summary(first, home_option="")
    second = run(make_config("train.weight_decay=1.5"), place, what="retrain")

    assert (first.decision, first.promoted) == ("promote", True)
    assert (second.decision, second.promoted) == ("hold", False)
    pointer = aliases.read_alias(store, "sums", "production")
    assert pointer is not None
    assert pointer.version == first.version
    assert [event.kind for event in event_log.events(store, "sums")] == [
        "published",
        "promoted",
        "published",
        "refused",
    ]
    check_outcome(replace(first, untold={}), champion=None)
    check_outcome(second, champion=1.0)
    check_what_a_person_sees(screen, place.home / "runs" / first.run_id / "pipeline.log")
    assert summary(second, home_option="").count(f"fineloop chat sums@{second.version}") == 1
    assert "fineloop adapters rollback" not in summary(first, home_option="")  # nothing held the alias before
    successor = replace(first, metrics={**first.metrics, "champion": first.metrics["base"]})
    assert "fineloop adapters rollback sums --home x" in summary(successor, home_option=" --home x")


def test_where_keys_are_trusted_a_job_of_its_own_compares_and_a_training_cannot_promote_itself(
    stub_cluster: JobsApi,
    store: Store,
    make_config: Callable[..., RunConfig],
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions_key, evaluations_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    for name, key in (("FINELOOP_SIGNING_KEY", versions_key), ("FINELOOP_EVALUATION_KEY", evaluations_key)):
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        monkeypatch.setenv(name, pem)
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
    assert pointer is not None
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
    assert body["store"].keys() == {"endpoint", "bucket", "prefix"}
    end = "promote" if body["promoted"] else "hold"
    steps = ["ground", "prepare", "finetune", "evaluate", "gate", end, "report", "total"]
    assert list(body["timings_s"]) == steps
    assert sum(body["timings_s"][step] for step in steps[:-1]) <= body["timings_s"]["total"]
    assert body["reasons"]
    page = Path(body["report"]).read_text()
    assert body["run_id"] in page


def check_what_a_person_sees(screen: str, log_path: Path) -> None:
    assert all(line.startswith("[") for line in screen.splitlines())
    assert "[finetune] 1/2" in screen
    assert "KFP" not in screen
    assert "KFP Executor" in log_path.read_text()
    finished = [line.split("]")[0][1:] for line in screen.splitlines() if "] finished in" in line]
    assert finished == ["servers", "prepare", "finetune", "evaluate", "gate", "promote", "report"]


@pytest.mark.slow
def test_training_alone_publishes_and_leaves_the_alias(
    stub_cluster: JobsApi, store: Store, make_config: Callable[..., RunConfig], place: Place
) -> None:
    outcome = run(make_config(), place, what="train")

    assert aliases.read_alias(store, "sums", "production") is None
    assert [version.version for version in versions.list_versions(store, "sums")] == [outcome.version]
    assert outcome.as_json().keys() == RUN_KEYS - {"decision", "verdict", "promoted", "reasons", "report"}
    assert outcome.metrics["candidate"] is not None
    assert "adapters promote sums@" in summary(outcome, home_option="")


@pytest.mark.slow
def test_a_trackers_secret_lies_in_a_private_file_of_the_run_for_as_long_as_it_goes_on(
    stub_cluster: JobsApi,
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, int, str]] = []

    class Looking(io.StringIO):
        """A terminal that looks for the file whenever it is written to."""

        def write(self, text: str) -> int:
            for path in (tmp_path / "home").rglob(TRACKER_SECRETS_FILE):
                where = str(path.relative_to(tmp_path / "home/runs"))
                seen.append((where, path.stat().st_mode & 0o777, path.read_text()))
            return super().write(text)

    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, f"secret of {name}")
    tracking = make_config("track.wandb=team/sums")
    run(tracking, Place(tmp_path / "home", Looking()), what="train", run_id="run-1")
    assert set(seen) == {(f"run-1/{TRACKER_SECRETS_FILE}", 0o600, '{"WANDB_API_KEY": "secret of WANDB_API_KEY"}')}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret of" in path.read_bytes()]


def test_an_explicit_address_wins_over_the_environments(
    stub_cluster: JobsApi,
    make_config: Callable[..., RunConfig],
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    run(make_config(), Place(place.home, place.terminal, address=stub_cluster.address), what="train")
    assert len(stub_cluster.jobs) == 1


def test_an_address_is_refused_where_each_job_has_a_cluster_of_its_own(
    make_config: Callable[..., RunConfig], place: Place
) -> None:
    elsewhere = Place(place.home, place.terminal, address="http://127.0.0.1:9")
    with pytest.raises(UserError, match="Drop --address"):
        run(make_config("ray.cluster.kind=rayjob"), elsewhere, what="train")
    assert not place.home.exists()


@pytest.mark.parametrize("what", ["retrain", pytest.param("train", marks=pytest.mark.slow)])
def test_a_users_mistake_inside_a_ray_job_is_a_users_mistake_outside(
    stub_cluster: JobsApi, store: Store, make_config: Callable[..., RunConfig], place: Place, what: str
) -> None:
    with pytest.raises(DataError, match="every answer is empty") as caught:
        run(make_config("method.dropout=0.1"), place, what=what)  # type: ignore[arg-type]

    note, *more = caught.value.__notes__
    assert note.startswith("step finetune; log: ")
    assert Path(note.rpartition(": ")[2]).is_file()
    if what == "retrain":
        (report,) = more
        page = Path(report.removeprefix("report: ")).read_text()
        assert "the finetune step failed" in page
        assert "every answer is empty" in page
    assert versions.list_adapters(store) == []


@pytest.mark.slow
def test_a_crash_inside_a_ray_job_shows_its_last_lines(
    stub_cluster: JobsApi, make_config: Callable[..., RunConfig], place: Place
) -> None:
    with pytest.raises(JobError, match="MemoryError: no memory for the adapter"):
        run(make_config("method.dropout=0.2"), place, what="retrain")


@pytest.mark.parametrize("run_id", ["..", "a/b", "-x"])
def test_what_is_no_name_of_a_run_makes_no_folder(
    make_config: Callable[..., RunConfig], place: Place, run_id: str
) -> None:
    with pytest.raises(UserError, match=r"run_id .*: takes letters"):
        run(make_config(), place, what="retrain", run_id=run_id)
    assert not place.home.exists()


def test_a_gpu_that_is_not_there_is_said_before_anything_starts(
    make_config: Callable[..., RunConfig], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("ray.use_gpu=true", "ray.num_workers=1024", "train.batch_size=8192")  # no machine has so many
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"ray.*asks for a GPU.*(Ray sees none|this machine has)"):
        run(config, place, what="train")
    assert not place.home.exists()


def test_missing_data_is_said_before_any_ray_job(
    stub_cluster: JobsApi, make_config: Callable[..., RunConfig], place: Place
) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        run(make_config("data.source=/nowhere.jsonl"), place, what="retrain")
    assert stub_cluster.jobs == {}


def test_a_run_that_its_gate_cannot_decide_on_is_refused_before_any_ray_job_and_a_training_has_no_gate(
    stub_cluster: JobsApi, make_config: Callable[..., RunConfig], place: Place
) -> None:
    config = make_config("gate.min_records=60")
    with pytest.raises(DataError, match=r"are left for the gate to decide on, and gate\.min_records asks for 60"):
        run(config, place, what="retrain")
    assert stub_cluster.jobs == {}
    assert run(config, place, what="train").version


@pytest.mark.slow
def test_a_run_that_finds_nothing_new_is_skipped(
    stub_cluster: JobsApi, store: Store, make_config: Callable[..., RunConfig], place: Place, data_path: Path
) -> None:
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
    assert "data.min_new_records=0" in summary(skipped, home_option="")
    assert "there is too little new to train on" in Path(str(skipped.report)).read_text()

    more = [{"id": str(n), "prompt": f"How much is {n} + 1?", "completion": str(n + 1)} for n in range(60, 65)]
    data_path.write_text(data_path.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    assert run(make_config("data.min_new_records=5", "train.weight_decay=0.5"), place, what="retrain").promoted


@pytest.mark.slow
def test_a_run_that_promoted_and_was_cut_off_goes_on_to_the_same_version(
    stub_cluster: JobsApi, store: Store, make_config: Callable[..., RunConfig], place: Place
) -> None:
    first = run(make_config(), place, what="retrain", run_id="again")
    stub_cluster.jobs.clear()  # a head that starts anew knows of none
    second = run(make_config(), place, what="retrain", run_id="again")
    assert (first.promoted, second.promoted, second.decision) == (True, True, "promote")
    assert second.version == first.version
    assert [event.kind for event in event_log.events(store, "sums")] == ["published", "promoted"]


@pytest.mark.slow
def test_a_repeated_run_id_repeats_nothing(
    stub_cluster: JobsApi, store: Store, make_config: Callable[..., RunConfig], place: Place
) -> None:
    first = run(make_config(), place, what="retrain", run_id="again")
    second = run(make_config(), place, what="retrain", run_id="again")

    assert second.version == first.version
    assert second.promoted
    assert len(stub_cluster.jobs) == 1
    assert [event.kind for event in event_log.events(store, "sums")] == ["published", "promoted"]
