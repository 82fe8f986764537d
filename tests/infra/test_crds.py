"""The definitions that `make crds` fetches are those that the manifests are checked against."""

import gzip
import hashlib
from pathlib import Path

import pytest

from infra.checks import crds, schemas

BODY = b"kind: X\n"
SUM = hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize(("served", "sha256", "status"), [(BODY, SUM, 0), (BODY, "0" * 64, 1), (None, SUM, 1)])
def test_a_definition_is_kept_when_its_sum_is_right(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, served: bytes | None, sha256: str, status: int
) -> None:
    source, folder = tmp_path / "served.yaml", tmp_path / "crds"
    if served:
        source.write_bytes(served)
    monkeypatch.setattr(crds, "FILES", {source.as_uri(): sha256})
    monkeypatch.setattr(crds, "FOLDER", folder)
    assert crds.main() == status
    assert [path.name for path in folder.iterdir()] == ["served.yaml"] * (status == 0)
    source.unlink(missing_ok=True)
    assert crds.main() == status, "what is there is not fetched again"


@pytest.mark.parametrize("url", crds.FILES)
def test_the_pinned_sums_are_those_of_the_definitions_in_use(url: str) -> None:
    name = url.rpartition("/")[2]
    found = sorted((schemas.crds_folder() or Path("nowhere")).glob(f"{name}*"))
    if not found:
        pytest.skip(f"no {name}: {schemas.HOW}")
    body = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
    assert hashlib.sha256(body).hexdigest() == crds.FILES[url]


def test_a_folder_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(schemas.VARIABLE, "/nowhere")
    with pytest.raises(NotADirectoryError, match="make crds"):
        schemas.crds_folder()
