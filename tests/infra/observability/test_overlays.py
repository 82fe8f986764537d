"""Each overlay takes infra/observability in by one line, which is a comment until the cluster knows its kinds."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from infra.checks import check, schemas
from infra.checks.check import policies_of, violations
from infra.checks.manifests import (
    OBSERVABILITY,
    OVERLAYS,
    PARTS,
    ROOT,
    Manifest,
    of_kind,
    render,
    render_overlay,
    render_with,
)
from infra.checks.policies.access import everything_is_in_the_namespace
from tests.infra.definitions import DEFINITIONS
from tests.infra.ends import ENDS, TO_PODS, who_reaches

KINDS = ("PodMonitor", "ServiceMonitor", "PrometheusRule")


def watched(overlay: str) -> list[Manifest]:
    """All that policies hold for."""
    parts = [manifest for part in PARTS if part for manifest in render(f"infra/overlays/{overlay}/{part}")]
    return [*render_with(overlay, OBSERVABILITY), *parts]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nobody_without_the_operator_is_asked_for_its_kinds(overlay: str) -> None:
    assert list(of_kind(render_overlay(overlay), *KINDS)) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_line_takes_in_all_of_it_and_changes_nothing_else(overlay: str) -> None:
    lines = (ROOT / "infra" / "overlays" / overlay / "kustomization.yaml").read_text(encoding="utf-8").splitlines()
    assert [line.partition("  # with")[0] for line in lines if OBSERVABILITY in line] == [f"  # {OBSERVABILITY}"]
    plain, found = render(f"infra/overlays/{overlay}"), render_with(overlay, OBSERVABILITY)
    added = [manifest for manifest in found if manifest not in plain]
    assert len(found) == len(plain) + len(added)
    assert sorted(map(repr, added)) == sorted(map(repr, render("infra/observability")))


@pytest.mark.parametrize("crds", DEFINITIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_of_a_watched_overlay_is_valid(overlay: str, crds: Path | None) -> None:
    found = {manifest["kind"]: schemas.errors(manifest, crds) for manifest in render_with(overlay, OBSERVABILITY)}
    assert set(KINDS) <= found.keys()
    assert {kind: errors for kind, errors in found.items() if errors} == {}


@pytest.mark.parametrize("crds", DEFINITIONS)
@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("PodMonitor", ("spec", "podMetricEndpoints"), []),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "intervall"), "15s"),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "interval"), "15 seconds"),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "scheme"), "ftp"),
        ("PodMonitor", ("spec", "namespaceSelector", "matchName"), ["fineloop"]),
        ("PodMonitor", ("spec", "selector", "matchLabel"), {}),
        ("ServiceMonitor", ("spec", "endpoints"), []),
        ("ServiceMonitor", ("spec", "endpoints", 0, "honorLabels"), "true"),
        ("PrometheusRule", ("spec", "groups", 1, "rules", 0, "exp"), "1"),
        ("PrometheusRule", ("spec", "groups", 1, "rules", 0, "record"), "both:an:alert"),
        ("PrometheusRule", ("spec", "groups", 1, "rules", 0, "labels", "severity"), 1),
    ],
)
def test_a_wrong_field_of_the_operators_is_found(
    kind: str, path: tuple[str | int, ...], value: object, crds: Path | None
) -> None:
    manifest = next(of_kind(render_with("aws", OBSERVABILITY), kind))
    place: Any = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert schemas.errors(manifest, crds)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_watched_overlay_keeps_every_policy(overlay: str) -> None:
    assert list(violations(watched(overlay), policies_of(overlay))) == []


@pytest.mark.parametrize(
    ("kind", "namespace"), [("PodMonitor", "fineloop"), ("PrometheusRule", None), ("CronJob", "monitoring")]
)
def test_what_watches_and_nothing_else_lies_where_prometheus_is(kind: str, namespace: str | None) -> None:
    manifests = watched("aws")
    next(of_kind(manifests, kind))["metadata"]["namespace"] = namespace
    (found,) = everything_is_in_the_namespace(manifests)
    assert f"namespace is {namespace}" in found


def test_watching_opens_no_way_to_a_pod() -> None:
    """Its policy opens the metrics of the workflow controller, which is none of these pods."""
    plain, found = render_overlay("aws"), watched("aws")
    ways = product((end for end in ENDS.values() if end.namespace == "fineloop"), {port for _, port, _ in TO_PODS})
    assert [way for way in ways if who_reaches(found, *way) != who_reaches(plain, *way)] == []


def test_the_check_that_people_run_takes_a_watched_overlay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "render_overlay", watched)
    monkeypatch.setattr("sys.argv", ["check", "kind"])
    assert check.main() == 0, capsys.readouterr().out
