"""The runbook's commands are some: their programs know them, their files are there, their versions the checked ones."""

import re
import shlex
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.config import config_file
from infra.checks.crds import KUBERAY, KUEUE
from infra.checks.manifests import INFRA, KUBECTL, ROOT, render
from infra.checks.policies.access import RIGHTS
from infra.checks.schemas import KUBERNETES
from pipelines import cli
from pipelines.commands.arguments import SERVICE_ACCOUNT
from tests.infra.runbook import RUNBOOK, Command, after, commands

CHARTS = {"kuberay/kuberay-operator": KUBERAY, "oci://registry.k8s.io/kueue/charts/kueue": KUEUE}
KUBEFLOW: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("kubeflow_objects.yaml").read_text(encoding="utf-8"))
PIPELINES = INFRA / "kubeflow/pipelines"
NAMED = r"\b(crd|deployment|svc|configmap)[ /]([\w.-]+)"


@pytest.mark.parametrize("command", commands("kubectl"), ids=shlex.join)
def test_kubectl_knows_the_command_and_its_options(command: Command) -> None:
    """With --help, kubectl reads verb and options, says what is wrong with them, and asks no cluster."""
    done = subprocess.run([KUBECTL, *command[1:], "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verb = next(word for word in command[1:] if not word.startswith("-") and word != "fineloop")
    assert f"kubectl {verb}" in done.stdout


@pytest.mark.parametrize("command", commands("fineloop"), ids=shlex.join)
def test_fineloop_knows_the_command_and_takes_its_config(command: Command) -> None:
    options = cli.parser().parse_args(command[1:])
    if getattr(options, "config", None):
        ray = config_file.load(options.config, options.overrides).ray
        assert ("ray.cluster.kind=rayjob" in options.overrides) == (ray.cluster.kind == "rayjob")


def test_make_knows_the_targets_and_every_path_is_there() -> None:
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {target for command in commands("make") for target in command[1:]} <= set(rules)
    words = {word.rpartition("=")[2] for command in commands() for word in command}
    paths = {word for word in words if re.match(r"(infra|pipelines|tests)/", word)}
    assert "infra/kueue/helm-values.yaml" in paths
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_what_is_installed_are_the_versions_that_the_manifests_are_checked_against() -> None:
    helm = [command for verb in ("install", "upgrade") for command in commands("helm", verb)]
    versions = {command[3]: after(command, "--version") for command in helm}
    assert [chart for chart, source in CHARTS.items() if f"/v{versions[chart]}/" not in source] == []
    (kubeflow,) = {ref for kustomization in PIPELINES.rglob("kustomization.yaml") for ref in refs(kustomization)}
    kuberay, kueue = (versions[chart] for chart in CHARTS)
    stated = [f"Kubernetes {KUBERNETES}", f"KubeRay {kuberay}", f"Kueue {kueue}", f"Ray {metadata.version('ray')}"]
    stated.append(f"Kubeflow Pipelines {kubeflow}")
    assert [each for each in stated if each not in " ".join(RUNBOOK.split())] == []


def refs(kustomization: Path) -> list[str]:
    """The releases that it takes from kubeflow/pipelines."""
    return re.findall(r"github\.com/kubeflow/pipelines/\S+\?ref=(\S+)", kustomization.read_text(encoding="utf-8"))


def kubeflow(release: str, scratch: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What our kustomization makes of a Kubeflow that has this release's names and no more."""
    there = KUBEFLOW[release]
    objects = [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": n}} for n in there["configmap"]]
    repository = {"artifactRepository": "endpoint: seaweedfs.kubeflow.svc:9000"}
    next(o for o in objects if o["metadata"]["name"] == "workflow-controller-configmap")["data"] = repository
    for name in there["deployment"]:
        pod = {"spec": {"containers": [{"name": there["container"].get(name, "main")}]}}
        deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}}
        objects.append({**deployment, "spec": {"template": pod}})
    base, ours = scratch / "base", shutil.copytree(PIPELINES, scratch / "ours")
    base.mkdir()
    (base / "all.yaml").write_text(yaml.safe_dump_all(objects), encoding="utf-8")
    (base / "kustomization.yaml").write_text("namespace: kubeflow\nresources: [all.yaml]\n", encoding="utf-8")
    overlay = ours / "kustomization.yaml"
    overlay.write_text(re.sub(r"https://\S+", "../base", overlay.read_text(encoding="utf-8")), encoding="utf-8")
    done = subprocess.run([KUBECTL, "kustomize", ours], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {(found["kind"], found["metadata"]["name"]): found for found in yaml.safe_load_all(done.stdout)}


@pytest.mark.parametrize("release", KUBEFLOW)
def test_kubeflow_is_given_our_namespace_and_an_account_that_may_start_ray_jobs(release: str, tmp_path: Path) -> None:
    """Its manifests and launcher have the namespace kubeflow written in them, and its own account starts no Ray job."""
    found = kubeflow(release, tmp_path)
    assert {each["metadata"]["namespace"] for each in found.values()} == {"fineloop"}
    deployments = {name: each["spec"] for (kind, name), each in found.items() if kind == "Deployment"}
    containers = {name: spec["template"]["spec"]["containers"] for name, spec in deployments.items()}
    assert {len(each) for each in containers.values()} == {1}  # a container of another name would be one more
    settings = {each["name"]: each["value"] for each in containers["ml-pipeline"][0]["env"]}
    assert settings["DEFAULTPIPELINERUNNERSERVICEACCOUNT"] == SERVICE_ACCOUNT
    store = yaml.safe_load(found["ConfigMap", "kfp-launcher"]["data"]["providers"])["minio"]["default"]
    assert store["endpoint"] == f"{settings['OBJECTSTORECONFIG_HOST']}:9000" == "seaweedfs.fineloop:9000"
    argo = found["ConfigMap", "workflow-controller-configmap"]["data"]
    assert argo["artifactRepository"] == "endpoint: seaweedfs.fineloop.svc:9000"
    assert ("get", f"secrets={store['credentials']['secretRef']['secretName']}") in RIGHTS[SERVICE_ACCOUNT]
    # A key that KFP itself keeps elsewhere would be written and read by nobody.
    settable = KUBEFLOW[release]["configmap"]["pipeline-install-config"]
    assert found["ConfigMap", "pipeline-install-config"]["data"].keys() <= set(settable)
    # What Kubeflow has for its first version alone runs no pod; EKS would start none of the cache's.
    asleep = {name for (_, name), each in found.items() if each.get("spec", {}).get("replicas") == 0}
    needed = {"ml-pipeline", "ml-pipeline-persistenceagent", "ml-pipeline-scheduledworkflow", "workflow-controller"}
    assert asleep >= {"cache-deployer-deployment", "cache-server"}
    assert not asleep & needed


# What Argo 4.0.5 has of a pod on Kubernetes 1.34, and whether its step is to run again. The first four, 143 and the
# graph were seen on a cluster; the others are the kubelet's words (pkg/kubelet/eviction/helpers.go, nodeshutdown,
# preemption).
ENDS = [
    ("Error", "-1", "pod deleted", True),
    ("Failed", "1", "main: OOMKilled (exit code 1)", True),
    ("Failed", "-1", 'Usage of EmptyDir volume "x" exceeds the limit "10Mi". ', True),
    ("Failed", "1", "main: Error (exit code 1)", False),
    ("Failed", "2", "main: Error (exit code 2)", False),
    ("Failed", "143", "main: Error (exit code 143)", True),
    ("Failed", "137", "main: Error (exit code 137)", True),
    ("Failed", "-1", "The node was low on resource: memory. Threshold quantity: 100Mi, available: 80Mi.", True),
    ("Failed", "-1", 'Container main exceeded its local ephemeral storage limit "1Gi". ', True),
    ("Failed", "-1", "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ", True),
    ("Failed", "-1", "Pod was terminated in response to imminent node shutdown.", True),
    ("Failed", "-1", "Preempted in order to admit critical pod", True),
    ("Error", "-1", "", False),  # a graph whose step is lost for good
    ("Failed", "-1", "Pod was active on the node longer than the specified deadline", False),
]


@pytest.mark.parametrize(("status", "exit_code", "message", "again"), ENDS)
def test_a_step_is_run_again_for_what_took_its_pod_and_not_for_its_own_exit_code(
    status: str, exit_code: str, message: str, again: bool
) -> None:
    patch = yaml.safe_load((PIPELINES / "lost-steps.yaml").read_text(encoding="utf-8"))
    strategy = yaml.safe_load(patch["data"]["workflowDefaults"])["spec"]["templateDefaults"]["retryStrategy"]
    assert strategy["retryPolicy"] == "Always"  # another would let the expression see less
    # Three words of the language that Argo has its expressions in, expr-lang, are others in Python.
    words = {r"lastRetry\.(\w+)": r"\1", r"asInt\((\w+)\)": r"int(\1)", r"(\w+) matches\s+('[^']*')": r"search(\2, \1)"}
    expression = strategy["expression"].replace("||", "or").replace("&&", "and")
    for theirs, ours in words.items():
        expression = re.sub(theirs, ours, expression)
    lost = {"status": status, "exitCode": exit_code, "message": message}
    assert bool(eval(expression, {"__builtins__": {}}, {**lost, "search": re.search, "int": int})) == again


def test_a_namespace_is_there_before_anything_goes_into_it() -> None:
    """In the order of the commands; the API server refuses what has none: namespaces "fineloop" not found."""
    there, applied = {"default", "kube-system"}, 0
    for command in commands():
        if "--create-namespace" in command:
            there.add(after(command, "--namespace"))
        if command[0] == "kubectl" and "-n" in command:
            assert after(command, "-n") in there, command
        if command[0] == "kubectl" and "-k" in command:
            folder = after(command, "-k")
            objects = [] if ROOT / folder in (PIPELINES, PIPELINES / "cluster-scoped") else render(folder)
            there |= {each["metadata"]["name"] for each in objects if each["kind"] == "Namespace"}
            wanted = {each["metadata"].get("namespace", "default") for each in objects} or {"fineloop"}
            assert wanted <= there, command
            applied += 1
    assert applied > 5


@pytest.mark.parametrize("release", KUBEFLOW)
def test_what_the_runbook_names_of_kubeflow_is_in_its_manifests(release: str) -> None:
    there, ours = KUBEFLOW[release], {"fineloop-s3", "fineloop-experiments-head-svc"}
    kubectl = [" ".join(command) for command in commands("kubectl") if "create" not in command]
    asked = {each for command in kubectl for each in re.findall(NAMED, command) if each[1] not in ours}
    assert {name for _, name in asked} >= {"ml-pipeline", "ml-pipeline-ui", "workflow-controller"}
    assert [(kind, name) for kind, name in asked if name not in there[kind]] == []


def test_every_test_that_the_security_table_names_exists() -> None:
    for file, test in re.findall(r"`(test_\w+\.py)::(test_\w+)`", RUNBOOK):
        assert f"def {test}(" in Path(__file__).with_name(file).read_text(encoding="utf-8")
