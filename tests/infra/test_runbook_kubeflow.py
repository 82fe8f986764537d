"""The runbook's way to Kubeflow from an empty cluster: everything that it applies finds its namespace."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.checks.manifests import KUBECTL, Manifest, render
from tests.infra.runbook import Command, commands

COMMANDS = commands()
NAMESPACE = "fineloop"
KUBEFLOW = ".fineloop/kfp/"
BUILT_IN = {"default", "kube-system", "kube-public", "kube-node-lease"}

# manifests/kustomize/cluster-scoped-resources of kubeflow/pipelines, whose Namespace is named in another way by each of
# these releases. Of their resources only the Namespace is left, and the one account that 2.16 takes its name from.
RESOURCES = """
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization

namespace: kubeflow

resources:
- namespace.yaml
- cache-deployer-sa.yaml
"""
KUSTOMIZATIONS = {
    "2.16.0": f"""{RESOURCES}
vars:
- fieldref:
    fieldPath: metadata.namespace
  name: kfp-cluster-scoped-namespace
  objref:
    apiVersion: v1
    kind: ServiceAccount
    name: kubeflow-pipelines-cache-deployer-sa
configurations:
- params.yaml
""",
    "2.17.0": f"""{RESOURCES}
generatorOptions:
  disableNameSuffixHash: true

configMapGenerator:
- name: kfp-cluster-scoped-params
  literals:
  - namespace=kubeflow

replacements:
- source:
    kind: ConfigMap
    name: kfp-cluster-scoped-params
    fieldPath: data.namespace
  targets:
  - select:
      kind: Namespace
    fieldPaths:
    - metadata.name
""",
}
BESIDE = {
    "namespace.yaml": """
apiVersion: v1
kind: Namespace
metadata:
  name: '$(kfp-cluster-scoped-namespace)'
  labels:
    pod-security.kubernetes.io/enforce: baseline
    pod-security.kubernetes.io/warn: restricted
""",
    "cache-deployer-sa.yaml": """
apiVersion: v1
kind: ServiceAccount
metadata:
  name: kubeflow-pipelines-cache-deployer-sa
""",
    "params.yaml": """
varReference:
- path: metadata/name
  kind: Namespace
""",
}
# Of manifests/kustomize/env/platform-agnostic/kustomization.yaml, the same in both, what speaks of kubeflow.
PLATFORM_AGNOSTIC = """
namespace: kubeflow
labels:
- includeSelectors: true
  pairs:
    application-crd-id: kubeflow-pipelines
"""


def at(folder: Path, release: str) -> Path:
    """Both kustomizations of a release where the runbook clones it to."""
    manifests = folder / KUBEFLOW / "manifests/kustomize"
    scoped, platform = manifests / "cluster-scoped-resources", manifests / "env/platform-agnostic"
    for each in (scoped, platform):
        each.mkdir(parents=True)
    for name, text in {**BESIDE, "kustomization.yaml": KUSTOMIZATIONS[release]}.items():
        (scoped / name).write_text(text, encoding="utf-8")
    (platform / "kustomization.yaml").write_text(PLATFORM_AGNOSTIC, encoding="utf-8")
    return manifests


@pytest.mark.parametrize("release", KUSTOMIZATIONS)
def test_kubeflows_manifests_are_led_into_our_namespace(tmp_path: Path, release: str) -> None:
    """By kustomize's own word on what upstream's two ways to name a Namespace come to."""
    manifests = at(tmp_path, release)
    (edit,) = [c for c in COMMANDS if c.program == "sed" and any(KUBEFLOW in word for word in c.words)]
    subprocess.run(edit.words, cwd=tmp_path, check=True)
    scoped = manifests / "cluster-scoped-resources"
    rendered = subprocess.run([KUBECTL, "kustomize", scoped], capture_output=True, text=True, check=True).stdout
    objects: list[Manifest] = list(yaml.safe_load_all(rendered))
    assert [each["metadata"]["name"] for each in objects if each["kind"] == "Namespace"] == [NAMESPACE]
    assert {each["metadata"]["namespace"] for each in objects if each["kind"] != "Namespace"} == {NAMESPACE}
    platform = (manifests / "env/platform-agnostic/kustomization.yaml").read_text(encoding="utf-8")
    assert platform == PLATFORM_AGNOSTIC.replace("namespace: kubeflow\n", f"namespace: {NAMESPACE}\n")


def test_a_namespace_is_there_before_anything_goes_into_it() -> None:
    """In the order of the commands; the API server refuses what has none: namespaces "fineloop" not found."""
    there, applied = set(BUILT_IN), 0
    for command in COMMANDS:
        if command.program == "helm" and "--create-namespace" in command.words:
            there.add(after(command, "--namespace"))
        if command.program != "kubectl":
            continue
        if "-n" in command.words:
            assert after(command, "-n") in there, command
        if "-k" in command.words:
            wanted, made = namespaces(after(command, "-k"))
            there |= made
            assert wanted <= there, command
            applied += 1
    assert applied > 5


RENDERED: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "kubeflow_objects.yaml").read_text(encoding="utf-8"))
KINDS = {"crd", "deployment", "svc", "configmap"}


def named(command: Command) -> Iterator[tuple[str, str]]:
    """The objects that a command of kubectl names, as KIND/NAME or KIND NAME."""
    for word, following in zip(command.words, [*command.words[1:], ""], strict=True):
        kind, _, name = word.partition("/")
        if kind in KINDS and "create" not in command.words:
            yield kind, name or following


@pytest.mark.parametrize("release", RENDERED)
def test_what_the_runbook_names_of_kubeflow_is_in_its_manifests(release: str) -> None:
    there = RENDERED[release]
    kinds = {"Deployment": "deployment", "Service": "svc", "ConfigMap": "configmap", "RayCluster": "svc"}
    ours = {
        (kinds[each["kind"]], each["metadata"]["name"] + ("-head-svc" if each["kind"] == "RayCluster" else ""))
        for folder in ("overlays/kind", "overlays/kind/raycluster")
        for each in render(f"infra/{folder}")
        if each["kind"] in kinds
    }
    asked = {each for command in COMMANDS if command.program == "kubectl" for each in named(command)}
    of_kubeflow = asked - ours
    assert {name for _, name in of_kubeflow} >= {"ml-pipeline", "ml-pipeline-ui", "kfp-launcher", "workflow-controller"}
    assert [(kind, name) for kind, name in of_kubeflow if name not in there[kind]] == []


@pytest.mark.parametrize("release", RENDERED)
def test_what_the_runbook_sets_in_a_config_map_of_kubeflow_is_read_from_there(release: str) -> None:
    """Where KFP keeps such a key itself: a key that no release had would be written and read by nobody."""
    patches = [command for command in COMMANDS if "patch" in command.words and "-p" in command.words]
    assert patches
    for patch in patches:
        (config_map,) = [name for kind, name in named(patch) if kind == "configmap"]
        assert json.loads(after(patch, "-p"))["data"].keys() <= set(RENDERED[release]["configmap"][config_map])


def after(command: Command, flag: str) -> str:
    return command.words[command.words.index(flag) + 1]


def namespaces(folder: str) -> tuple[set[str], set[str]]:
    """Where the objects of a folder go, and which namespaces it makes itself."""
    if folder.startswith(KUBEFLOW):
        return {NAMESPACE}, set()
    objects = render(folder)
    made = {each["metadata"]["name"] for each in objects if each["kind"] == "Namespace"}
    return {each["metadata"]["namespace"] for each in objects if "namespace" in each["metadata"]}, made
