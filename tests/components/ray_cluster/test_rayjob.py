"""What only a RayJob can meet: the queue, refusals of the API server, watches that break, and clusters that fail."""

import contextlib
import io
import time
from pathlib import Path
from typing import Any

import pytest

from components.ray_cluster.kubernetes_api import Watched
from components.ray_cluster.submit import connect
from components.shared.errors import JobError, UserError
from infra.checks import schemas
from tests.components.ray_cluster.conftest import Cluster, config
from tests.doubles.kubernetes.api import Refusal, Resource
from tests.waiting import wait_until


def deployment(found: Resource) -> str:
    return str((found.get("status") or {}).get("jobDeploymentStatus") or "")


@pytest.mark.parametrize(("verb", "resource"), [("create", "rayjobs"), ("list", "rayjobs"), ("watch", "rayjobs")])
def test_a_right_that_is_missing_is_named_with_the_account_and_the_role(cluster, verb, resource):
    cluster.api.denied.add((verb, resource))
    with pytest.raises(JobError, match=f"fineloop-pipeline may not {verb} {resource}.*kubectl apply -k infra/rbac"):
        cluster.submit("")


def test_a_cluster_without_kuberay_is_said(cluster: Cluster) -> None:
    cluster.api.is_installed = False
    with pytest.raises(JobError, match=r"KubeRay is not installed: the cluster knows no rayjobs\.ray\.io"):
        cluster.submit("")


def test_credentials_that_do_not_count_are_said(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(cluster.api.kubeconfig(tmp_path / "old", token="expired")))
    with pytest.raises(JobError, match="401 Unauthorized"):
        cluster.submit("")


def test_no_way_to_a_cluster_is_a_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(UserError, match="set KUBECONFIG"):
        connect(config())


@pytest.mark.skipif(schemas.crds_folder() is None, reason=f"no definition of a RayJob: {schemas.HOW}")
@pytest.mark.parametrize(("field", "value"), [("backoffLimit", "often"), ("fromTheFuture", True)])
def test_a_field_that_the_server_refuses_or_does_not_know_is_named(cluster: Cluster, field: str, value: object) -> None:
    cluster.api.admit = lambda body: body["spec"].update({field: value})
    with pytest.raises(JobError, match=field):
        cluster.submit("")


def test_a_rayjob_that_came_to_be_meanwhile_is_followed(cluster: Cluster) -> None:
    """Another process of the same step, between our look and our creation."""
    output = io.StringIO()

    def race(body: Resource) -> None:
        cluster.api.admit = lambda _: None
        cluster.api._create(body, strict=True)

    cluster.api.admit = race
    assert cluster.submit("print('once')", output=output) == "fineloop-r-finetune-1"
    assert output.getvalue() == "once\n"
    assert any("came to be meanwhile" in line for line in cluster.caplog.messages)


def test_what_may_pass_is_asked_again(cluster: Cluster) -> None:
    cluster.api.outages = 3
    assert cluster.submit("") == "fineloop-r-finetune-1"
    assert cluster.api.outages == 0


@pytest.mark.parametrize("broken", ["drop_watches", "compact"])
def test_a_watch_that_breaks_is_begun_again(cluster: Cluster, broken: str) -> None:
    """A connection that is cut, or 410 Gone: the history is no longer there."""
    cluster.operator.pods_ready = False

    def act(_name: str) -> None:
        getattr(cluster.api, broken)()
        cluster.operator.pods_ready = True

    cluster.when(lambda found: deployment(found) == "Initializing", act)
    output = io.StringIO()
    cluster.submit("print('done')", output=output)
    assert output.getvalue() == "done\n"


def held(cluster: Cluster, **workload: Any) -> None:
    """Kueue: a job is held back, and its workload says why, for half a second."""

    def hold(body: Resource) -> None:
        body["spec"]["suspend"] = True

    def release(name: str) -> None:
        time.sleep(0.5)
        with contextlib.suppress(KeyError):  # it was given up
            cluster.api.write(name, lambda found: found["spec"].update(suspend=False))

    def explain(name: str) -> None:
        uid = cluster.api.rayjobs[name]["metadata"]["uid"]
        metadata = {"name": f"rayjob-{name}", "labels": {"kueue.x-k8s.io/job-uid": uid}}
        cluster.api.workloads[name] = {"metadata": metadata, "spec": {}, "status": {}, **workload}
        release(name)

    cluster.api.admit = hold
    cluster.when(lambda found: deployment(found) == "Suspended", explain if workload else release)


def test_a_person_hears_where_the_job_stands_and_what_kueue_says_of_one_that_it_does_not_let_in(cluster, monkeypatch):
    monkeypatch.setattr("components.ray_cluster.rayjob.IDLE_WINDOW_S", 0.1)
    quota = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": "insufficient quota"}
    held(cluster, status={"conditions": [quota]})
    cluster.submit("import time; time.sleep(0.5)")
    assert "RayJob: queued by Kueue in fineloop: insufficient quota" in cluster.caplog.messages
    assert [line for line in cluster.caplog.messages if line.startswith("RayJob: ")][-1] == "RayJob: complete"


def test_a_job_that_never_fits_its_queue_ends_in_minutes_with_what_to_do(cluster, monkeypatch):
    monkeypatch.setattr("components.ray_cluster.rayjob.IDLE_WINDOW_S", 0.1)
    monkeypatch.setattr("components.ray_cluster.rayjob.HOPELESS_S", 0.0)
    quota = {"type": "QuotaReserved", "status": "False", "reason": "ExceedsMaxQuota", "message": "16 > 8"}
    held(cluster, status={"conditions": [quota]})
    with pytest.raises(JobError, match=r"never fits its queue: .*ray\.cluster\.worker\): 16 > 8"):
        cluster.submit("")
    assert cluster.api.rayjobs == {}


def test_a_queue_that_may_not_be_looked_into_is_said_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.ray_cluster.rayjob.IDLE_WINDOW_S", 0.1)
    cluster.api.denied.add(("list", "workloads"))
    held(cluster)
    cluster.submit("")
    assert len([line for line in cluster.caplog.messages if "may not list workloads" in line]) == 1


def test_a_failed_job_is_tried_on_another_cluster_and_its_last_log_counts(cluster, tmp_path, monkeypatch):
    """Here for workers that did not come, which is a matter of the cluster."""
    monkeypatch.setattr("components.ray_cluster.rayjob_manifest.BACKOFF_LIMIT", 1)
    failure = '[finetune] failed {"error": "WorkersMissing", "message": "0 of 2 CPUs", "exit_code": 1}'
    code = f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'tried')!r}); s = p.exists(); p.touch(); "
    code += f"s or print({failure!r}, flush=True); sys.exit(0 if s else 1)"
    cluster.submit(code)
    assert [state for _, state in cluster.operator.history].count("Retrying") == 1


@pytest.mark.parametrize(("code", "stays_s"), [("print('well')", 0), ("raise SystemExit(1)", 600)])
def test_the_cluster_of_a_job_that_succeeded_goes_at_once_and_that_of_another_can_be_looked_at(cluster, code, stays_s):
    with contextlib.suppress(JobError):
        cluster.submit(code)
    (found,) = cluster.api.rayjobs.values()
    assert found["spec"]["ttlSecondsAfterFinished"] == stays_s


def test_a_cluster_that_cannot_be_let_go_fails_no_job(cluster: Cluster) -> None:
    cluster.api.denied.add(("patch", "rayjobs"))
    cluster.submit("print('well')")
    assert "stays for 600 s" in cluster.caplog.text
    assert "fineloop-pipeline may not patch rayjobs" in cluster.caplog.text


@pytest.mark.parametrize("dashboard", ["open", "closed"])
def test_the_log_of_a_job_whose_head_was_replaced_goes_on_with_the_second_submitters(cluster, tmp_path, dashboard):
    if dashboard == "closed":
        cluster.operator.dashboard_url = "127.0.0.1:9"
    code = f"""
import pathlib, time
began = pathlib.Path({str(tmp_path / "began")!r})
if began.exists():
    print("resumes")
else:
    print("step\\n" * 20, end="", flush=True)
    began.touch()
    time.sleep(60)
"""
    output = io.StringIO()

    def lose_its_head(name: str) -> None:
        wait_until(lambda: output.getvalue().count("step") == 20, output.getvalue)
        cluster.operator.replace_head(name)

    cluster.when(lambda rayjob: deployment(rayjob) == "Running", lose_its_head)
    cluster.submit(code, output=output)
    assert output.getvalue().splitlines()[-1] == "resumes"
    assert output.getvalue().count("step") == 20


@pytest.mark.parametrize(
    ("reason", "warned"), [("ContainerCreating", False), ("PodInitializing", False), ("failing to pull image", True)]
)
def test_a_submitter_that_is_being_made_is_nothing_to_warn_of(cluster: Cluster, reason: str, warned: bool) -> None:
    """The log of a container that does not run is refused in the kubelet's words (Kubernetes 1.34:
    validateContainerLogStatus in pkg/kubelet/kubelet_pods.go)."""
    cluster.operator.dashboard_url = "127.0.0.1:9"
    message = f'container "ray-job-submitter" in pod "fineloop-r-finetune-1-x7k2p" is waiting to start: {reason}'
    refusal = Refusal(400, "BadRequest", message)
    refusal.body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": 400}
    answers = [refusal]

    def answer(_verb: str, _resource: str) -> None:
        if answers and cluster.api.requests[-1][1] == "pods/log":
            raise answers.pop()

    cluster.api.before_answer = answer
    output = io.StringIO()
    cluster.submit("import time; print('begun', flush=True); time.sleep(1)", output=output)
    assert "begun\n" in output.getvalue()
    assert answers == []
    warnings = [line for line in cluster.caplog.messages if "could not read the log" in line]
    assert [reason in line for line in warnings] == [True] * warned


def in_a_step_of(cluster: Cluster, workflow: str, monkeypatch: pytest.MonkeyPatch, **spec: Any) -> None:
    """Let this process be a step's pod as Argo makes it."""
    pod = f"{workflow}-system-container-impl-{len(cluster.api.pods)}"
    owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": workflow, "uid": f"uid-{workflow}"}
    owner |= {"controller": True, "blockOwnerDeletion": True}
    cluster.api.pods[pod] = {"metadata": {"name": pod, "ownerReferences": [owner]}}
    metadata = {"name": workflow, "uid": f"uid-{workflow}"}
    cluster.api.workflows[workflow] = {"metadata": metadata, "spec": spec, "status": {"phase": "Running"}}
    monkeypatch.setenv("KFP_POD_NAME", pod)
    for module in ("rayjob", "kubernetes_api"):
        monkeypatch.setattr(f"components.ray_cluster.{module}.own_namespace", lambda: "fineloop")


def test_the_workflow_of_the_run_owns_the_rayjob_and_that_of_a_later_run_joins_it(cluster, monkeypatch):
    for workflow in ("first", "first", "second"):
        in_a_step_of(cluster, workflow, monkeypatch)
        cluster.submit("")
    (found,) = cluster.api.rayjobs.values()
    assert [owner["name"] for owner in found["metadata"]["ownerReferences"]] == ["first", "second"]
    monkeypatch.setattr("components.ray_cluster.rayjob.own_namespace", lambda: "elsewhere")
    assert connect(config())._workflow is None  # type: ignore[attr-defined]


WAITS_FOR_A_FILE = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.05)"


def test_a_drained_steps_job_goes_on_and_the_step_that_is_run_again_follows_it(cluster, monkeypatch, tmp_path):
    """No code of a step runs when its pod goes: it is left as soon as its job runs."""
    in_a_step_of(cluster, "nightly-x7k2p", monkeypatch)
    waits = Watched.wait

    def wait(watched: Watched, seconds: float) -> Any:
        if watched.newest and deployment(watched.newest) == "Running":
            raise SystemExit(143)
        return waits(watched, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(Watched, "wait", wait)
        with pytest.raises(SystemExit):
            cluster.submit(WAITS_FOR_A_FILE.format(str(tmp_path / "go")))
    (found,) = cluster.api.rayjobs.values()
    assert not found["metadata"].get("deletionTimestamp")
    in_a_step_of(cluster, "nightly-x7k2p", monkeypatch)
    (tmp_path / "go").touch()
    assert cluster.submit("raise SystemExit('a second one')") == "fineloop-r-finetune-1"
    assert any("exists: following it" in line for line in cluster.caplog.messages)


@pytest.mark.parametrize(
    "change",
    [
        # What each writes: Kubeflow's TerminateRun, `argo stop`, Argo at the end, a deletion; last, it is gone.
        {"spec": {"activeDeadlineSeconds": 0}},
        {"spec": {"shutdown": "Stop"}},
        {"status": {"phase": "Failed"}},
        {"metadata": {"deletionTimestamp": "2026-11-25T23:12:17Z"}},
        None,
    ],
)
def test_the_job_of_a_run_that_ends_is_stopped_by_its_step_before_any_signal(cluster, monkeypatch, tmp_path, change):
    in_a_step_of(cluster, "nightly-x7k2p", monkeypatch)
    cluster.when(
        lambda found: deployment(found) == "Running", lambda _: cluster.api.end_workflow("nightly-x7k2p", change)
    )
    with pytest.raises(JobError, match="the run is being stopped, and RayJob fineloop-r-finetune-1 with it"):
        cluster.submit(WAITS_FOR_A_FILE.format(str(tmp_path / "never")))
    assert all(found["metadata"].get("deletionTimestamp") for found in cluster.api.rayjobs.values())


def test_a_run_that_goes_on_keeps_its_job_whatever_is_written_into_its_workflow(cluster, monkeypatch, tmp_path):
    in_a_step_of(cluster, "nightly-x7k2p", monkeypatch)

    def report(_name: str) -> None:
        cluster.api.end_workflow("nightly-x7k2p", {"status": {"progress": "3/9"}})
        (tmp_path / "go").touch()

    cluster.when(lambda found: deployment(found) == "Running", report)
    assert cluster.submit(WAITS_FOR_A_FILE.format(str(tmp_path / "go"))) == "fineloop-r-finetune-1"


@pytest.mark.parametrize("verb", ["list", "watch"])
def test_a_run_whose_end_cannot_be_asked_for_keeps_its_job(cluster, monkeypatch, tmp_path, verb):
    """`fineloop runs stop` and `fineloop reap` stop it if the run is over."""
    in_a_step_of(cluster, "nightly-x7k2p", monkeypatch, activeDeadlineSeconds=0 if verb == "list" else None)
    cluster.api.denied.add((verb, "workflows"))
    (tmp_path / "go").touch()
    assert cluster.submit(WAITS_FOR_A_FILE.format(str(tmp_path / "go"))) == "fineloop-r-finetune-1"
    assert any("whether the run goes on is not known" in line for line in cluster.caplog.messages)


def test_stopping_in_vain_is_said_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.ray_cluster.rayjob.STOP_S", 0.5)
    cluster.api.denied.add(("delete", "rayjobs"))
    connect(config()).stop("fineloop-r-finetune-1")
    (warnings,) = cluster.caplog.messages
    assert "may not delete rayjobs" in warnings
