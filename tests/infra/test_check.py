"""The check that people run before they apply an overlay."""

import json
from pathlib import Path

import pytest

from infra.checks import check, schemas


def run(monkeypatch: pytest.MonkeyPatch, overlay: str) -> int:
    monkeypatch.setattr("sys.argv", ["check", overlay])
    return check.main()


def test_an_overlay_without_placeholders_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "kind") == 0
    assert "nothing wrong" in capsys.readouterr().out


def test_placeholders_are_told_with_where_to_fill_them_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "aws") == 1
    told = capsys.readouterr().out
    assert "RayJob/fineloop-example-finetune-1: registry.invalid stands for" in told
    assert "account/kustomization.yaml" in told


def test_what_a_policy_and_a_schema_find_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = check.render_overlay("kind")
    job = next(manifest for manifest in manifests if manifest["kind"] == "RayJob")
    job["spec"] |= {"submissionMode": "SidecarMode", "backoffLimits": 1}
    monkeypatch.setattr(check, "render_overlay", lambda overlay: manifests)
    assert run(monkeypatch, "kind") == 1
    told = capsys.readouterr().out
    assert "no_pod_of_kuberays_own_is_refused: RayJob/" in told
    assert "'backoffLimits' was unexpected" in told


@pytest.mark.skipif(schemas.crds_folder() is None, reason=f"{schemas.VARIABLE} is not set: `make crds` says how")
def test_a_field_of_our_own_schemas_that_no_definition_has_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path in schemas.OWN.glob("*.json"):
        schema = json.loads(path.read_text(encoding="utf-8"))
        schema["$defs"].get("ResourceGroup", {}).get("properties", {})["quota"] = {"type": "string"}
        schema["$defs"].get("WorkerGroupSpec", {}).get("properties", {})["size"] = {"type": "string"}
        (tmp_path / path.name).write_text(json.dumps(schema), encoding="utf-8")
    monkeypatch.setattr(schemas, "OWN", tmp_path)
    schemas._own_validators.cache_clear()
    try:
        found = set(schemas.own_fields_that_are_unknown(Path(str(schemas.crds_folder()))))
    finally:
        schemas._own_validators.cache_clear()
    assert found == {
        "ClusterQueue.spec.resourceGroups[].quota",
        "RayJob.spec.rayClusterSpec.workerGroupSpecs[].size",
        "RayCluster.spec.workerGroupSpecs[].size",
    }
