"""One set of rules for every way to a cluster: against doubles in every run, against a real Ray head with `-m e2e`, and
with `-m kubernetes` against a real API server under the rights that infra/rbac gives."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from components.config import config_file
from components.config.ray import RayConfig, RayJobCluster
from components.config.schema import RunConfig
from components.finetune.finetune import finetune
from components.ray_cluster import submit
from components.ray_cluster.backend import Job
from components.ray_cluster.submit import connect, stop_run, submit_and_wait
from components.shared.errors import ConfigError, Conflict, DataError, JobError, UserError
from components.shared.protocol import TRAINED
from components.step.step import StepRun
from components.store.store import Store
from pipelines.local.local_services import local_services
from pipelines.local.seaweedfs import Endpoint
from tests.components.ray_cluster.submitting import submitting
from tests.doubles.hub import serving
from tests.doubles.jobs_api import TOKEN, JobsApi
from tests.doubles.kubernetes.api import KubernetesDouble
from tests.doubles.kubernetes.control_plane import RayJobsOfCluster, needs_control_plane
from tests.doubles.kubernetes.operator import Operator
from tests.waiting import PATIENCE_S, wait_until

StartStep = Callable[[Job], subprocess.Popen[bytes]]


@dataclass
class Cluster:
    """The environment holds what its client needs."""

    ray: RayConfig
    status_of: Callable[[str], str]

    def submit(self, job: Job, output: io.StringIO | None = None, **part: str) -> str:
        return submit_and_wait(job, self.ray, output=output or io.StringIO(), **part)

    def job_id(self, job: Job, attempt: int = 1) -> str:
        return connect(self.ray).job_id(job, attempt)

    def is_stopped(self, job: Job) -> bool:
        """A RayJob's cluster goes a moment after the RayJob."""
        return wait_until(
            lambda: self.status_of(self.job_id(job)) == "STOPPED", lambda: self.status_of(self.job_id(job))
        )


KINDS = ("jobs-api", "rayjob", pytest.param("kubernetes", marks=needs_control_plane))


@pytest.fixture(scope="module", params=[*KINDS, pytest.param("ray", marks=pytest.mark.e2e)])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, s3_server: Endpoint
) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(Path.cwd())}
    with pytest.MonkeyPatch.context() as patch:
        # A process keeps the token that it used first, so all kinds take the same.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        patch.delenv("RAY_ADDRESS", raising=False)
        if request.param == "jobs-api":
            jobs = JobsApi(directory, environment, token=TOKEN)
            patch.setenv("RAY_ADDRESS", jobs.address)
            yield Cluster(RayConfig(), lambda job_id: jobs.jobs[job_id].status)
            jobs.close()
        elif request.param in ("rayjob", "kubernetes"):
            api: KubernetesDouble | RayJobsOfCluster
            if request.param == "rayjob":
                api = KubernetesDouble()
                end, kubeconfig = api.close, api.kubeconfig(directory / "kubeconfig")
            else:
                plane = request.getfixturevalue("control_plane")
                api = RayJobsOfCluster(plane)
                end, kubeconfig = api.clear, plane.account("fineloop-pipeline")  # with the rights of infra/rbac alone
            operator = Operator(api, directory, environment)
            patch.setenv("KUBECONFIG", str(kubeconfig))
            patch.setattr("components.ray_cluster.rayjob_manifest.BACKOFF_LIMIT", 0)
            ray = RayConfig(cluster=RayJobCluster(kind="rayjob"))
            yield Cluster(ray, lambda name: (operator.dashboard.jobs.get(name) or operator.past[name]).status)
            operator.close()
            end()
        else:
            (directory / "ray").mkdir()
            (directory / "ray" / "token").write_text(TOKEN)
            with local_services(directory, bucket=s3_server.bucket) as environment:
                for name, value in environment.items():
                    patch.setenv(name, value)
                yield Cluster(RayConfig(), lambda job_id: ray_status(environment["RAY_ADDRESS"], job_id))


ON_RAY_IN_MAKE_SLOW = pytest.mark.parametrize(
    "cluster", [*KINDS, pytest.param("ray", marks=[pytest.mark.e2e, pytest.mark.slow])], indirect=True, scope="module"
)
"""Of rules about attempts and logs, which ask of a cluster what the other tests have asked the real Ray already."""


def ray_status(address: str, submission_id: str) -> str:
    from ray.job_submission import JobSubmissionClient

    return str(JobSubmissionClient(address).get_job_status(submission_id).value)


@pytest.fixture
def run_id(request: pytest.FixtureRequest) -> str:
    return f"{request.node.originalname[:60]}-{os.getpid()}-{time.time_ns()}"


@pytest.fixture
def start_step(cluster: Cluster) -> Iterator[StartStep]:
    """Starts a step in a process of its own, which is gone when the test is over, however that ends."""
    with contextlib.ExitStack() as steps:

        def start(job: Job) -> subprocess.Popen[bytes]:
            step = steps.enter_context(subprocess.Popen(submitting(job, cluster.ray), stderr=subprocess.PIPE))
            steps.callback(step.kill)
            return step

        yield start


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return ("python", "-u", "-c", code, *arguments)


def job(run_id: str, code: str, *arguments: str, timeout_s: float = 60) -> Job:
    return Job(run_id=run_id, task="finetune", command=python(code, *arguments), timeout_s=timeout_s)


def wait_for(path: Path) -> None:
    wait_until(path.exists, path)


def test_success_returns_the_first_attempt_and_copies_the_log(cluster: Cluster, run_id: str) -> None:
    output = io.StringIO()
    submission_id = cluster.submit(job(run_id, "print('[finetune] one'); print('last', end='')"), output)
    assert submission_id == cluster.job_id(job(run_id, "pass"), 1)
    assert "[finetune] one\nlast\n" in output.getvalue()
    assert cluster.status_of(submission_id) == "SUCCEEDED"


def test_arguments_reach_the_entry_point_whatever_they_hold(cluster: Cluster, run_id: str) -> None:
    awkward = ["it's", 'a "quoted" word', "$HOME; rm -rf x", "two\nlines", ""]
    output = io.StringIO()
    cluster.submit(job(run_id, "import sys; print(repr(sys.argv[1:]))", *awkward), output)
    assert repr(awkward) in output.getvalue()


def test_the_log_comes_while_the_job_runs(cluster: Cluster, run_id: str, tmp_path: Path) -> None:
    class Told(io.StringIO):
        def write(self, text: str) -> int:
            if "[finetune] 1/2" in text:
                (tmp_path / "seen").touch()
            return super().write(text)

    code = (
        "import pathlib, sys, time\nprint('[finetune] 1/2')\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.02)\n"
    )
    cluster.submit(job(run_id, code, str(tmp_path / "seen")), Told())


@pytest.mark.parametrize("kind", [DataError, Conflict])
def test_a_failure_comes_back_as_the_error_that_the_job_raised(cluster, run_id, kind):
    code = (
        "import sys\nfrom components.shared import errors\nfrom components.shared.protocol import say_failure\n"
        f"error = errors.{kind.__name__}('data.source is empty: it\\'s \"nothing\"\\nat all')\n"
        "say_failure('finetune', error)\nsys.exit(error.exit_code)\n"
    )
    with pytest.raises(kind) as caught:
        cluster.submit(job(run_id, code))
    assert type(caught.value) is kind
    assert str(caught.value) == 'data.source is empty: it\'s "nothing"\nat all'


def test_a_job_that_dies_without_a_word_shows_its_last_lines(cluster: Cluster, run_id: str) -> None:
    # In the log of a busy Ray head, what a job says may stand before the line that says what was started.
    with pytest.raises(JobError, match=r"(?s)exit code 9.*\n  CUDA out of memory(\n|$)"):
        cluster.submit(job(run_id, "print('CUDA out of memory'); raise SystemExit(9)"))


def test_a_job_that_ray_ended_for_its_node_s_memory_says_so(cluster: Cluster, run_id: str) -> None:
    rays = "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7)"
    code = f"print({rays!r})\nfor line in range(40): print(line)\nraise SystemExit(1)"
    with pytest.raises(JobError, match="failed: a node ran out of memory"):
        cluster.submit(job(run_id, code))


@ON_RAY_IN_MAKE_SLOW
def test_a_failed_attempt_is_followed_by_the_next_number_with_its_own_log(cluster: Cluster, run_id: str) -> None:
    with pytest.raises(JobError):
        cluster.submit(job(run_id, "print('attempt one'); raise SystemExit(9)"))
    output = io.StringIO()
    submission_id = cluster.submit(job(run_id, "print('attempt two')"), output)
    assert submission_id.endswith("-2")
    assert "attempt one" not in output.getvalue()


@ON_RAY_IN_MAKE_SLOW
def test_a_success_is_reused_and_not_run_again(cluster: Cluster, run_id: str, tmp_path: Path) -> None:
    count = tmp_path / "count"
    counting = job(run_id, "import sys; open(sys.argv[1], 'a').write('x')", str(count))
    first = cluster.submit(counting)
    second = cluster.submit(counting)
    assert first == second
    assert count.read_text() == "x"


WAITING = (
    "import pathlib, sys, time\nprint('[finetune] waiting'); pathlib.Path(sys.argv[1], 'up').touch()\n"
    "while not pathlib.Path(sys.argv[1], 'go').exists(): time.sleep(0.02)\nprint('[finetune] went')\n"
)


@ON_RAY_IN_MAKE_SLOW
def test_two_steps_share_a_job_and_each_waits_for_its_part_of_the_log(cluster, run_id, tmp_path, caplog):
    caplog.set_level("INFO", logger="components")
    both = job(run_id, f"print('[finetune] one'); print('[finetune] {TRAINED}')\n{WAITING}", str(tmp_path))
    first, second = io.StringIO(), io.StringIO()
    job_id = cluster.submit(both, first, upto=TRAINED)
    assert cluster.status_of(job_id) == "RUNNING"
    wait_for(tmp_path / "up")
    (tmp_path / "go").touch()
    assert cluster.submit(both, second, after=TRAINED) == job_id
    assert cluster.status_of(job_id) == "SUCCEEDED"
    assert "[finetune] one\n" in first.getvalue()
    assert first.getvalue().endswith(f"[finetune] {TRAINED}\n")
    assert "one" not in second.getvalue()
    assert "[finetune] went\n" in second.getvalue()
    assert any(line.endswith(f"{job_id} exists: following it") for line in caplog.messages)


MISTAKEN = (
    "import sys\nfrom components.shared import errors\nfrom components.shared.protocol import say, say_failure\n"
    "open(sys.argv[1], 'a').write('x')\nsay('finetune', 'trained: comparing it')\n"
    "error = getattr(errors, sys.argv[2])('wrong')\nsay_failure('evaluate', error)\nsys.exit(error.exit_code)\n"
)


@ON_RAY_IN_MAKE_SLOW
def test_a_failed_job_is_run_again_by_the_next_attempt_at_its_step(cluster, run_id, tmp_path):
    """A user's mistake too: who presses Kubeflow's Retry has mended it, and Argo does not try again by itself."""
    failing = replace(job(run_id, MISTAKEN, str(tmp_path / "count"), "DataError"), kfp_run_id="3f2a")
    for _ in range(2):
        with pytest.raises(DataError, match=r"^wrong$"):
            cluster.submit(failing, after=TRAINED)
    assert (tmp_path / "count").read_text() == "xx"


@ON_RAY_IN_MAKE_SLOW
def test_a_job_that_fails_in_the_part_of_one_step_has_done_that_of_the_one_before(cluster, run_id, tmp_path):
    failing = job(run_id, MISTAKEN, str(tmp_path / "count"), "DataError")
    assert cluster.submit(failing, upto=TRAINED)


def test_a_step_killed_outright_finds_its_running_job_again(cluster, run_id, tmp_path, start_step):
    waiting = job(run_id, WAITING, str(tmp_path))
    first = start_step(waiting)
    wait_for(tmp_path / "up")
    first.kill()
    first.wait()
    output = io.StringIO()
    (tmp_path / "go").touch()
    submission_id = cluster.submit(waiting, output)
    assert submission_id.endswith("-1")
    assert "[finetune] waiting\n" in output.getvalue()
    assert "[finetune] went\n" in output.getvalue()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_job_before_the_step_ends(cluster, run_id, tmp_path, start_step, number):
    waiting = job(run_id, WAITING, str(tmp_path))
    step = start_step(waiting)
    wait_for(tmp_path / "up")
    step.send_signal(number)
    step.communicate(timeout=PATIENCE_S)
    assert step.returncode != 0
    assert cluster.is_stopped(waiting)


def test_a_job_past_its_deadline_is_stopped_and_the_field_named(cluster: Cluster, run_id: str, tmp_path: Path) -> None:
    waiting = job(run_id, WAITING, str(tmp_path), timeout_s=0.5)
    with pytest.raises(JobError, match="ray\\.timeout_s"):
        cluster.submit(waiting)
    assert cluster.is_stopped(waiting)


@ON_RAY_IN_MAKE_SLOW
def test_stop_run_stops_the_runs_jobs_and_no_others(cluster, run_id, tmp_path, start_step):
    started = []
    for name in (run_id, f"{run_id}x"):
        folder = tmp_path / name
        folder.mkdir()
        started.append(start_step(job(name, WAITING, str(folder))))
        wait_for(folder / "up")
    assert stop_run(run_id, cluster.ray) == [cluster.job_id(job(run_id, "pass"))]
    _, errors = started[0].communicate(timeout=PATIENCE_S)
    assert b"was stopped by someone else" in errors
    assert cluster.status_of(cluster.job_id(job(f"{run_id}x", "pass"))) == "RUNNING"
    (tmp_path / f"{run_id}x" / "go").touch()
    started[1].communicate(timeout=PATIENCE_S)
    assert started[1].returncode == 0


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("", UserError, "RAY_ADDRESS is not set"),
        ("ray://head:10001", UserError, "ray://head:10001"),
        ("http://127.0.0.1:9", JobError, r"could not connect to http://127\.0\.0\.1:9"),
    ],
)
def test_an_address_that_leads_to_no_jobs_api_is_named(monkeypatch, address, kind, message) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(kind, match=message):
        submit_and_wait(job("r", "pass"))


def test_a_missing_token_says_which_variables_to_set(tmp_path: Path) -> None:
    with contextlib.closing(JobsApi(tmp_path, token=TOKEN)) as api:
        environment = {**os.environ, "RAY_ADDRESS": api.address, "RAY_AUTH_MODE": "disabled"}
        command = submitting(job("r", "pass"), python=sys.executable)  # one that imports Ray in that mode
        step = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert step.returncode == 1
    assert "JobError: could not connect" in step.stderr
    assert "RAY_AUTH_TOKEN_PATH" in step.stderr.splitlines()[-1]


CONFIG = """
[adapter]
name = "colours"
[model]
base = "{base}"
[data]
source = "s3://data/colours/"
[ray]
use_gpu = true
gpu = "H100"
[ray.cluster]
kind = "rayjob"
"""
GIB = 2**30


def configured(base: str, *overrides: str) -> RunConfig:
    return config_file.loads(CONFIG.format(base=base), overrides)


def test_a_base_of_the_hub_that_no_pods_disk_holds_is_refused_by_its_listing(tmp_path, monkeypatch):
    sizes = {f"model-0000{number}-of-4.safetensors": 32 * GIB for number in range(4)}
    same_again = ("original/model.safetensors", "consolidated.safetensors", "model.bin")
    for name, size in {**sizes, **dict.fromkeys(same_again, 100 * GIB)}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, size)
    with serving("org/name", tmp_path) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match=r"org/name and writes 128 GiB .* set ray\.cluster\.disk_gib=160"):
            submit.require_disk(configured("org/name"))
        submit.require_disk(configured("org/name", "ray.cluster.disk_gib=128"))
        assert not hub.sent
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    submit.require_disk(configured("org/name"))  # a hub that does not answer refuses nothing


def test_a_base_in_s3_has_the_size_of_all_that_a_pod_downloads(store: Store):
    for name, size in {"config.json": 3, "model.safetensors": 1000, "more/tokens.txt": 20}.items():
        store.put(f"bases/one/{name}", bytes(size))
    store.put("bases/one-more/model.safetensors", bytes(7))
    assert submit.base_bytes(configured(store.uri("bases/one")).model) == 1023
    assert submit.base_bytes(configured(store.uri("bases/none")).model) is None


def test_a_finetune_step_refuses_before_it_asks_for_pods(store, monkeypatch):
    """A request for pods would fail here, as no Kubernetes is there, and with another error."""
    monkeypatch.setattr(submit, "base_bytes", lambda _: 101 * GIB)
    run = StepRun("finetune", "night-1", configured("s3://bases/one"), store)
    with pytest.raises(ConfigError, match=r"writes 101 GiB .* set ray\.cluster\.disk_gib=127"):
        finetune(run, dataset_uri=store.uri("datasets/set"))
