"""Signed versions: somebody makes a key and trusts it; then two runs, a pull and a rollback.

The judges: Linux says which process holds which variable (/proc/PID/environ, proc(5)), and so does a metric of the
person's own, which runs where a base's or a task's code would; the cryptography library verifies each signature over
the pre-authentication encoding of DSSE's specification, put together here; OpenSSL makes the keys.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tests.doubles import mlflow_client
from tests.doubles.http_server import serving
from tests.doubles.mlflow_server import Mlflow
from tests.journeys.bucket import Bucket
from tests.journeys.conftest import Person

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SIGNING = {"FINELOOP_SIGNING_KEY", "FINELOOP_SIGNING_KEY_FILE", "FINELOOP_SIGNER"}
EVALUATING = {"FINELOOP_EVALUATION_KEY", "FINELOOP_EVALUATION_KEY_FILE", "FINELOOP_EVALUATION_SIGNER"}
OF_NIGHTS = {"FINELOOP_WEBHOOK_SECRET", "FINELOOP_SLACK_WEBHOOK", "FINELOOP_TEAMS_WEBHOOK", "FINELOOP_SMTP_URL"}
ANNOUNCING = {
    *OF_NIGHTS,
    "FINELOOP_MODEL_REGISTRY_TOKEN",
    *("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
}
TRACKING = {each for each in ANNOUNCING if each.startswith("MLFLOW")}
REPORTING = {"OPENLINEAGE_API_KEY"}
SECRETS = SIGNING | EVALUATING | ANNOUNCING | REPORTING | {"WANDB_API_KEY"}
SPY = """
import json, os, pathlib

def note(answer, reference):
    pathlib.Path(__file__).with_name("seen.json").write_text(json.dumps(sorted(os.environ)))
    return answer == reference
"""
MORE = """\
metrics = ["spy:note"]
[gate]
worse_than_champion_by = 100
worse_than_best_by = 100
[registry]
trusted_keys = [{keys}]
evaluation_keys = ["{evaluating}"]
"""


@dataclass(frozen=True)
class Seen:
    """A process: how it was started, and its variables as Linux keeps them."""

    command: str
    variables: frozenset[str]


class Watch:
    """Every process below this one while a `with` is open, and separately those below the Ray head."""

    def __init__(self, home: Path) -> None:
        self.below_the_head: dict[int, list[Seen]] = defaultdict(list)
        self.others: dict[int, list[Seen]] = defaultdict(list)
        self._endpoint, self._done = home / "ray/endpoint.json", threading.Event()
        self._thread = threading.Thread(target=self._look_on)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._done.wait(0.2):
            self._look()

    def _look(self) -> None:
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        head = set()
        with contextlib.suppress(OSError, ValueError):
            head = {json.loads(self._endpoint.read_text())["keeper_pid"]}
        while more := {pid for pid, parent in parents.items() if parent in head and pid not in head}:
            head |= more
        for pid in parents:
            with contextlib.suppress(OSError):
                command, environ = (Path(f"/proc/{pid}/{file}").read_bytes() for file in ("cmdline", "environ"))
                names = frozenset(each.partition(b"=")[0].decode(errors="replace") for each in environ.split(b"\0"))
                seen = Seen(command.replace(b"\0", b" ").decode(errors="replace"), names)
                into = self.below_the_head if pid in head else self.others
                if seen not in into[pid]:
                    into[pid].append(seen)


def made_key(person: Person, name: str) -> str:
    """As docs/registry.md says: the private key in a file, and its public key as a config takes it."""
    person.does(f"openssl genpkey -algorithm ed25519 -out {name}.pem")
    return public_key(person, name)


def public_key(person: Person, name: str) -> str:
    line = f'echo "ed25519:$(openssl pkey -in {name}.pem -pubout -outform DER | tail -c 32 | base64)"'
    return person.does(line).stdout.strip()


def trusts(person: Person, *keys: str, rows: int = 400) -> None:
    evaluating = public_key(person, "evaluating")
    person.has_colours(rows=rows, more=MORE.format(keys=", ".join(f'"{key}"' for key in keys), evaluating=evaluating))


def statements_on(version: str, public: str, bucket: Bucket) -> list[dict[str, Any]]:
    """Of everything that lies in the store beside the version."""
    return statements_by(public, [bucket.json(key) for key in bucket.keys(f"adapters/colours/signatures/{version}/")])


def statements_by(public: str, envelopes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What this key signed, by DSSE's specification alone."""
    key, found = Ed25519PublicKey.from_public_bytes(base64.b64decode(public.removeprefix("ed25519:"))), []
    for envelope in envelopes:
        payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
        encoded = b" ".join([b"DSSEv1", b"%d" % len(kind), kind, b"%d" % len(payload), payload])
        for signature in envelope["signatures"]:
            with contextlib.suppress(InvalidSignature):
                key.verify(base64.b64decode(signature["sig"]), encoded)
                found.append(json.loads(payload))
    return found


@dataclass(frozen=True)
class First:
    """A first run of somebody who signs, and all that was seen of it."""

    person: Person
    bucket: Bucket
    public: str
    answer: dict[str, Any]
    watch: Watch
    heard: list[tuple[bytes, str]]
    tracked: list[dict[str, Any]]
    """Runs of an MLflow that asks for the token."""


@pytest.fixture(scope="module")
def first(person: Person) -> First:
    public, _ = made_key(person, "signing"), made_key(person, "evaluating")
    trusts(person, public)
    person.has("spy.py", SPY)
    person.does("fineloop store up")
    secrets = {name: f"secret-of-{name.lower()}" for name in SECRETS - SIGNING - EVALUATING}
    signing = person.with_variables(
        **secrets,
        PYTHONPATH=str(person.folder),
        FINELOOP_SIGNING_KEY=(person.folder / "signing.pem").read_text(),
        FINELOOP_EVALUATION_KEY=(person.folder / "evaluating.pem").read_text(),
    )
    heard: list[tuple[bytes, str]] = []

    def hear(_verb: str, _path: str, _query: Any, body: bytes, headers: Any) -> tuple[int, Any]:
        heard.append((body, headers["X-Hub-Signature-256"]))
        return 200, {}

    mlflow = Mlflow("secret-of-mlflow_tracking_token")
    person.has("mlflow.py", Path(mlflow_client.__file__).read_text())
    with serving(hear) as url, serving(mlflow.handle) as tracker, Watch(person.home) as watch:
        servers = f"--set announce.webhook={url} --set track.mlflow={tracker}"
        run = signing.does(f"fineloop run -c colours.toml {servers} --json")
    return First(signing, Bucket.of(person), public, run.answer, watch, heard, mlflow.runs)


def test_where_a_key_is_trusted_a_first_run_is_compared_promoted_and_signed(first: First) -> None:
    assert first.answer["decision"] == "promote"
    version = first.answer["version"]
    (statement,) = statements_on(version, first.public, first.bucket)
    manifest = first.bucket.read(f"adapters/colours/versions/{version}/manifest.json")
    digest = {"sha256": hashlib.sha256(manifest).hexdigest()}
    assert statement["subject"] == [{"name": f"colours/{version}", "digest": digest}]
    assert statement["predicate"]["verificationResult"] == "PASSED"
    assert statement["predicate"]["fineloop_alias"] == "production"
    assert first.person.does("fineloop adapters pull colours -c colours.toml --json").answer["version"] == version
    assert first.person.does("fineloop adapters audit -c colours.toml --json").answer["findings"] == []


def test_what_was_compared_is_signed_by_the_step_that_evaluated_and_lies_apart_from_the_run(first: First) -> None:
    run_id, evaluating = first.answer["run_id"], public_key(first.person, "evaluating")
    beside, in_the_run = (
        {key.rpartition("/")[2] for key in first.bucket.keys(f"{folder}/{run_id}/")}
        - {"", ".validate_storage_marker"}  # Ray Train's own
        for folder in ("evaluations", "runs")
    )
    assert beside == {"evaluation.json", "evaluation_records.parquet", "evaluation.dsse.json", "decision.json"}
    assert not beside & in_the_run
    body = first.bucket.read(f"evaluations/{run_id}/evaluation.json")
    envelope = first.bucket.json(f"evaluations/{run_id}/evaluation.dsse.json")
    (statement,) = statements_by(evaluating, [envelope])
    assert statement["subject"][0]["name"] == f"colours/{first.answer['version']}"
    assert statement["predicate"]["evaluation_sha256"] == hashlib.sha256(body).hexdigest()
    assert statements_by(first.public, [envelope]) == []
    replayed = first.person.does(f"fineloop replay {run_id} -c colours.toml --json").answer
    assert (replayed["same"], replayed["unsigned"]) == (True, "")


def test_no_process_below_the_ray_head_holds_a_secret_while_it_trains(first: First) -> None:
    below = [seen for each in first.watch.below_the_head.values() for seen in each]
    assert any("RayTrainWorker" in seen.command for seen in below)
    assert any("ray_jobs.candidate" in seen.command for seen in below)
    assert any("ray_jobs.evaluate" in seen.command for seen in below)
    compilers = {"gcc", "cc1", "cc1plus", "c++", "g++", "collect2", "ld", "as"}  # of the worker that tracks
    holding = [(Path(seen.command.split(" ")[0]).name, seen.variables & SECRETS) for seen in below]
    assert [each for each in holding if each[1] - (TRACKING if each[0] in compilers else set())] == []
    listed = set(json.loads((first.person.folder / "seen.json").read_text()))
    assert "FINELOOP_CACHE" in listed  # it ran with the job's environment
    assert not listed & SECRETS


def test_of_the_steps_each_holds_what_it_alone_needs(first: First) -> None:
    held: dict[str, set[str]] = {}
    for each in first.watch.others.values():
        for seen in each:
            _, found, rest = seen.command.partition("--function_to_execute ")
            if found and str(first.person.folder) in seen.command:
                held.setdefault(rest.split()[0], set()).update(seen.variables & SECRETS)
    assert {"prepare", "finetune", "evaluate"} <= held.keys()
    may = {"promote": SIGNING | ANNOUNCING, "evaluate": EVALUATING, "report": REPORTING | OF_NIGHTS}
    assert {step: names - may.get(step, set()) for step, names in held.items()} == {step: set() for step in held}


def test_tracker_and_webhook_get_what_their_secrets_open_and_no_file_of_the_home_holds_one(first: First) -> None:
    (run,) = first.tracked
    assert (run["info"]["run_name"], run["info"]["status"]) == (first.answer["run_id"], "FINISHED")
    assert {"train/loss", "eval/loss"} <= {each["key"] for each in run["data"]["metrics"]}
    ((body, signature),) = first.heard
    expected = hmac.new(b"secret-of-fineloop_webhook_secret", body, "sha256").hexdigest()
    assert signature == f"sha256={expected}"
    key = (first.person.folder / "signing.pem").read_text().splitlines()[1]
    found = first.person.types(f"grep -rlF -e secret-of- -e '{key}' .fineloop")
    assert (found.exit_code, found.stdout) == (1, "")  # grep(1): no line was selected


@pytest.mark.full
def test_a_run_on_more_data_meets_its_champion_and_is_signed_too(first: First) -> None:
    trusts(first.person, first.public, rows=440)
    answer = first.person.does("fineloop run -c colours.toml --json").answer
    evaluation = first.bucket.json(f"evaluations/{answer['run_id']}/evaluation.json")
    assert evaluation["models"]["champion"]["version"] == first.answer["version"]
    assert answer["decision"] == "promote"
    assert answer["version"] != first.answer["version"]
    (statement,) = statements_on(answer["version"], first.public, first.bucket)
    assert statement["subject"][0]["name"] == f"colours/{answer['version']}"
    rolled_back = first.person.does("fineloop adapters rollback colours -c colours.toml --json").answer
    assert rolled_back["to"] == first.answer["version"]
