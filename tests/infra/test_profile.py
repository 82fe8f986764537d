"""In a Kubeflow of several namespaces ours is a profile, by one line of an overlay."""

import pytest

from infra.checks import schemas
from infra.checks.check import placeholders, policies_of, violations
from infra.checks.manifests import PARTS, PROFILE, ROOT, Manifest, of_kind, render, render_with

OVERLAYS = ("gpu", "aws")
"""A laptop's Kubeflow serves one."""


def changed(before: list[Manifest], after: list[Manifest]) -> set[str]:
    return {each["kind"] for each in after if each not in before}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_line_changes_the_namespace_and_where_kubeflow_is_asked(overlay: str) -> None:
    lines = (ROOT / "infra" / "overlays" / overlay / "kustomization.yaml").read_text(encoding="utf-8").splitlines()
    assert [line.partition("  # with")[0] for line in lines if PROFILE in line] == [f"  # {PROFILE}"]
    before, after = render(f"infra/overlays/{overlay}"), render_with(overlay, PROFILE)
    assert (len(after), changed(before, after)) == (len(before), {"Namespace", "ConfigMap"})
    (namespace,) = of_kind(after, "Namespace")
    # The profile controller's condition for a namespace that it did not make.
    assert namespace["metadata"]["annotations"] == {"owner": "owner@users.invalid"}
    assert (
        namespace["metadata"]["labels"].items()
        >= {
            "app.kubernetes.io/part-of": "kubeflow-profile",
            "pipelines.kubeflow.org/enabled": "true",
            "pod-security.kubernetes.io/enforce": "restricted",
        }.items()
    )
    (environment,) = of_kind(after, "ConfigMap")
    assert environment["data"]["KF_PIPELINES_ENDPOINT"] == "http://ml-pipeline.kubeflow.svc:8888"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_profile_keeps_every_policy_and_its_user_is_asked_for(overlay: str) -> None:
    parts = [manifest for part in PARTS if part for manifest in render(f"infra/overlays/{overlay}/{part}")]
    found = [*render_with(overlay, PROFILE), *parts]
    assert list(violations(found, policies_of(overlay))) == []
    assert [error for manifest in found for error in schemas.errors(manifest, None)] == []
    assert any("the user whose profile this is" in each for each in placeholders(found))
