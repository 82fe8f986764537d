"""Every command of the runbook is one: its program knows it, its files are there, its versions are the checked ones."""

import ast
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from infra.checks.crds import KUBERAY, KUEUE
from infra.checks.manifests import INFRA, KUBECTL, ROOT, render
from infra.checks.policies.access import RIGHTS
from infra.checks.schemas import KUBERNETES
from pipelines import cli
from pipelines.commands.arguments import load_config
from pipelines.commands.kubeflow_arguments import SERVICE_ACCOUNT
from tests.infra.runbook import RUNBOOK, Command, commands

COMMANDS = commands()
CHECKED = {"kubectl", "helm", "fineloop", "make", "python"}
PLAIN = {"kind", "docker", "git", "sed", "terraform", "printf", "export", "."}
"""Of these only the paths are checked."""
HELM = {
    ("repo", "add"): set(),
    ("install",): {"--version", "--namespace", "--create-namespace", "--wait", "--values", "--set"},
    ("upgrade",): {"--version", "--namespace", "--values"},
}
VERSIONS = {"kuberay/kuberay-operator": KUBERAY, "oci://registry.k8s.io/kueue/charts/kueue": KUEUE}


def of(program: str) -> list[object]:
    return [pytest.param(command, id=str(command)) for command in COMMANDS if command.program == program]


def test_the_runbook_uses_known_programs_alone() -> None:
    assert len(COMMANDS) > 50
    assert {command.program for command in COMMANDS} == CHECKED | PLAIN


@pytest.mark.parametrize("command", of("kubectl"))
def test_kubectl_knows_the_command_and_its_options(command: Command) -> None:
    """With --help, kubectl reads verb and options, says what is wrong with them, and asks no cluster."""
    done = subprocess.run([KUBECTL, *command.arguments, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verb = next(word for word in command.arguments if not word.startswith("-") and word != "fineloop")
    assert f"kubectl {verb}" in done.stdout


@pytest.mark.parametrize("options", [["get", "pods", "--bogus"], ["gett", "pods"], ["aply", "-k", "infra"]])
def test_kubectl_refuses_what_it_does_not_know(options: list[str]) -> None:
    done = subprocess.run([KUBECTL, *options, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode or f"kubectl {options[0]}" not in done.stdout


def test_what_is_applied_renders() -> None:
    folders = {c.arguments[c.arguments.index("-k") + 1] for c in COMMANDS if c.program == "kubectl" and "-k" in c.words}
    ours = {folder for folder in folders if not folder.startswith(".fineloop/")}
    assert len(ours) == 10
    assert all(render(folder) for folder in ours)


@pytest.mark.parametrize("command", of("helm"))
def test_helm_is_asked_for_what_it_knows(command: Command) -> None:
    verb = tuple(command.arguments[: 2 if command.arguments[0] == "repo" else 1])
    assert {word for word in command.arguments if word.startswith("--")} <= HELM[verb]


def test_helm_installs_the_versions_that_the_manifests_are_checked_against() -> None:
    installed = [c.arguments for c in COMMANDS if c.program == "helm" and c.arguments[0] in ("install", "upgrade")]
    versions = {a[2]: a[a.index("--version") + 1] for a in installed}
    assert {chart: f"/v{versions[chart]}/" in source for chart, source in VERSIONS.items()} == dict.fromkeys(
        VERSIONS, True
    )
    clone = next(c.arguments for c in COMMANDS if c.words[:2] == ("git", "clone"))
    versions["Kubeflow Pipelines"] = clone[clone.index("--branch") + 1]
    names = {"KubeRay": "kuberay/kuberay-operator", "Kueue": "oci://registry.k8s.io/kueue/charts/kueue"}
    stated = " ".join(RUNBOOK.read_text(encoding="utf-8").split())
    for name in ("KubeRay", "Kueue", "Kubeflow Pipelines"):
        assert f"{name} {versions[names.get(name, name)]}" in stated
    assert f"Kubernetes {KUBERNETES}" in stated
    assert f"Ray {metadata.version('ray')}" in stated


@pytest.mark.parametrize("command", of("fineloop"))
def test_fineloop_knows_the_command(command: Command) -> None:
    cli.parser().parse_args(command.arguments)


def test_kubeflow_is_told_where_it_is_and_whose_runs_start() -> None:
    """Its manifests and launcher have the namespace kubeflow written in them, and its own account starts no Ray job."""
    told = next(c.arguments for c in COMMANDS if c.words[3:5] == ("set", "env"))
    settings = dict(word.split("=") for word in told if "=" in word)
    assert settings["DEFAULTPIPELINERUNNERSERVICEACCOUNT"] == SERVICE_ACCOUNT
    patched = next(c.arguments for c in COMMANDS if "--patch-file" in c.words)
    patch = yaml.safe_load((ROOT / patched[patched.index("--patch-file") + 1]).read_text(encoding="utf-8"))
    store = yaml.safe_load(patch["data"]["providers"])["minio"]["default"]
    assert store["endpoint"] == f"{settings['OBJECTSTORECONFIG_HOST']}:9000" == "seaweedfs.fineloop:9000"
    secret = store["credentials"]["secretRef"]["secretName"]
    assert ("get", f"secrets={secret}") in RIGHTS[SERVICE_ACCOUNT]


def test_what_runs_are_told_is_a_config_that_makes_rayjobs() -> None:
    told = [c.words[1].removeprefix("CLUSTER=") for c in COMMANDS if c.words[1:] and c.words[1].startswith("CLUSTER=")]
    clusters = [load_config(cli.parser().parse_args(["submit", *each.split()])).ray.cluster for each in told]
    assert [cluster.kind for cluster in clusters] == ["rayjob", "rayjob"]
    assert "--image" in told[0], "off the laptop, steps run in an image that somebody pushed"


def test_what_is_scheduled_goes_before_what_people_start() -> None:
    created = next(c for c in COMMANDS if c.words[:3] == ("fineloop", "schedule", "create"))
    cluster = load_config(cli.parser().parse_args(created.arguments)).ray.cluster
    values = {m["metadata"]["name"]: m["value"] for m in render("infra/kueue") if m["kind"] == "WorkloadPriorityClass"}
    assert values[cluster.priority_class] == max(values.values())


def test_the_reaper_is_told_where_to_look_by_who_runs_it_outside_a_pod() -> None:
    by_hand = [
        cli.parser().parse_args(c.arguments) for c in COMMANDS if c.words[:2] == ("fineloop", "reap") and c.words[2:]
    ]
    assert [options.rayjobs for options in by_hand] == ["fineloop"]


@pytest.mark.parametrize("command", of("make"))
def test_make_knows_the_target(command: Command) -> None:
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(command.arguments) <= set(rules)


@pytest.mark.parametrize("command", of("python"))
def test_python_finds_the_module(command: Command) -> None:
    flag, package = command.arguments[:2]
    assert flag == "-m"
    assert (ROOT / package.replace(".", "/") / "__main__.py").is_file()


def test_every_path_of_a_command_is_there() -> None:
    words = {word.rpartition("=")[2] for command in COMMANDS for word in command.words}
    paths = {word for word in words if re.match(r"(infra|pipelines|tests)/", word)}
    assert "infra/kueue/helm-values.yaml" in paths
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_every_path_of_the_prose_is_there() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    quoted = re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:md|yaml|py|toml|Dockerfile))`", text)
    named = {*quoted, *re.findall(r"\]\(([^)#]+)\)", text)}
    missing = {name for name in named if not (INFRA / name).exists() and not (ROOT / name).exists()}
    assert missing == set()


def test_every_folder_is_in_the_tree() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    tree = text[text.index("```") : text.index("```", text.index("```") + 3)]
    folders = {path.name for path in INFRA.iterdir() if path.is_dir()}
    assert {folder for folder in folders if f"{folder}/" not in tree} == set()


def test_every_row_of_the_security_table_names_a_test_and_a_policy_that_exist() -> None:
    _, _, section = RUNBOOK.read_text(encoding="utf-8").partition("## Who can reach what\n")
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    named = {(file, test) for row in rows for file, test in re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)}
    assert len(rows) >= 10
    assert all("::test_" in row for row in rows)
    for file, test in named:
        assert test in functions(Path(__file__).with_name(file)), f"{file} has no {test}"
    policies = {name for row in rows for name in re.findall(r"\(`(\w+)`\)", row)}
    known = {name for path in (INFRA / "checks/policies").glob("*.py") for name in functions(path)}
    assert len(policies) >= 5
    assert policies <= known


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_laptops_cluster_is_what_kind_reads() -> None:
    config = yaml.safe_load((INFRA / "overlays/kind/kind-config.yaml").read_text(encoding="utf-8"))
    assert (config["kind"], config["apiVersion"]) == ("Cluster", "kind.x-k8s.io/v1alpha4")
    created = next(command for command in COMMANDS if command.words[:3] == ("kind", "load", "docker-image"))
    assert created.arguments[created.arguments.index("--name") + 1] == config["name"]
    assert [node["role"] for node in config["nodes"]] == ["control-plane", "worker"]
