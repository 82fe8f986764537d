"""Each policy holds for every overlay, and each has at least one way to break it that it sees."""

import re

import pytest

from infra.checks.check import PLACEHOLDERS, POLICIES, placeholders, policies_of, violations
from infra.checks.manifests import OVERLAYS, render_overlay
from infra.checks.policies.pods import images_have_a_digest
from infra.checks.policies.ray import kuberay_takes_the_jobs
from tests.infra.mutations import access, pods, ray
from tests.infra.mutations.breaks import Break, job

BREAKS = [
    found
    for module in (pods, ray, access)
    for found in vars(module).values()
    if isinstance(found, Break) and callable(found.policy)
]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_overlay_keeps_every_policy(overlay: str) -> None:
    assert list(violations(render_overlay(overlay), policies_of(overlay))) == []


@pytest.mark.parametrize("broken", [pytest.param(b, id=b.mutate.__name__) for b in BREAKS])
def test_a_policy_sees_it_when(broken: Break) -> None:
    manifests = render_overlay(broken.overlay)
    assert list(broken.policy(manifests)) == []
    broken.mutate(manifests)
    assert list(broken.policy(manifests))


def test_each_policy_can_be_broken() -> None:
    assert {broken.policy for broken in BREAKS} == {*POLICIES, images_have_a_digest}


KUBERAY = {
    "submissionMode": {"submissionMode": "HttpMode"},
    "one of rayClusterSpec": {"clusterSelector": {"ray.io/cluster": "x"}},
    "suspend needs": {"suspend": True, "shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0},
    "is negative": {"ttlSecondsAfterFinished": -1},
    "ttlSecondsAfterFinished needs": {"shutdownAfterJobFinishes": False},
    "deletionStrategy excludes": {"deletionStrategy": {"deletionRules": []} | {"onFailure": {}}},
    "clusterSelector excludes suspend": {"clusterSelector": {"ray.io/cluster": "x"}, "suspend": True},
    "clusterSelector excludes backoffLimit": {"clusterSelector": {"ray.io/cluster": "x"}},
    "SidecarMode excludes clusterSelector": {"submissionMode": "SidecarMode", "clusterSelector": {"a": "b"}},
    "SidecarMode excludes submitterPodTemplate": {"submissionMode": "SidecarMode", "submitterPodTemplate": {}},
    "SidecarMode excludes submitterConfig": {"submissionMode": "SidecarMode", "submitterConfig": {}},
    "InteractiveMode excludes": {"submissionMode": "InteractiveMode"},
    "activeDeadlineSeconds must": {"activeDeadlineSeconds": 0},
    "preRunningDeadlineSeconds must": {"preRunningDeadlineSeconds": 0},
    "backoffLimit is negative": {"backoffLimit": -1},
    "runtimeEnvYAML is": {"runtimeEnvYAML": "- pip"},
    "runtimeEnvYAML": {"runtimeEnvYAML": "pip: ["},
}


@pytest.mark.parametrize("rule", KUBERAY)
def test_kuberay_refuses_each_combination_by_its_rule(rule: str) -> None:
    manifests = render_overlay("aws")
    job(manifests).update(KUBERAY[rule])
    assert any(rule in found for found in kuberay_takes_the_jobs(manifests))


@pytest.mark.parametrize(("overlay", "expected"), [("kind", 0), ("gpu", 4), ("aws", 3)])
def test_what_is_to_be_filled_in_is_found(overlay: str, expected: int) -> None:
    found = {re.sub(r"^.*: ", "", line).partition(" ")[0] for line in placeholders(render_overlay(overlay))}
    assert len(found) == expected
    assert all(any(placeholder.startswith(name) for placeholder in PLACEHOLDERS) for name in found)
