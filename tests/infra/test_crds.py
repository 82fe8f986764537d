"""The definitions that `make crds` fetches are those that the manifests are checked against."""

import gzip
import hashlib
from pathlib import Path

import pytest

from infra.checks import crds, schemas
from infra.checks.crds import FILES, fetch

CRDS = schemas.crds_folder()


def served(folder: Path, body: bytes) -> str:
    path = folder / "served.yaml"
    path.write_bytes(body)
    return path.as_uri()


def test_a_definition_is_kept_when_its_sum_is_right(tmp_path: Path) -> None:
    url = served(tmp_path, b"kind: X\n")
    fetch(tmp_path / "crds", {url: hashlib.sha256(b"kind: X\n").hexdigest()})
    assert (tmp_path / "crds" / "served.yaml").read_bytes() == b"kind: X\n"


def test_a_definition_with_another_sum_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not"):
        fetch(tmp_path / "crds", {served(tmp_path, b"kind: Y\n"): "0" * 64})
    assert list((tmp_path / "crds").iterdir()) == []


def test_what_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    url, body = served(tmp_path, b"kind: X\n"), b"kind: X\n"
    files = {url: hashlib.sha256(body).hexdigest()}
    fetch(tmp_path / "crds", files)
    (tmp_path / "served.yaml").unlink()
    fetch(tmp_path / "crds", files)


@pytest.mark.skipif(CRDS is None, reason=f"{schemas.VARIABLE} is not set: `make crds` says how")
@pytest.mark.parametrize("url", FILES)
def test_the_pinned_sums_are_those_of_the_definitions_in_use(url: str) -> None:
    assert CRDS is not None
    plain = CRDS / url.rpartition("/")[2]
    body = plain.read_bytes() if plain.exists() else gzip.decompress(Path(f"{plain}.gz").read_bytes())
    assert hashlib.sha256(body).hexdigest() == FILES[url]


def test_a_folder_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(schemas.VARIABLE, "/nowhere")
    with pytest.raises(NotADirectoryError, match="make crds"):
        schemas.crds_folder()


def test_make_crds_prints_the_line_to_paste(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = b"kind: X\n"
    monkeypatch.setattr(crds, "FILES", {served(tmp_path, body): hashlib.sha256(body).hexdigest()})
    monkeypatch.setattr(crds, "FOLDER", tmp_path / "crds")
    assert crds.main() == 0
    assert capsys.readouterr().out == f"export FINELOOP_CRDS={tmp_path / 'crds'}\n"


def test_make_crds_says_what_cannot_be_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crds, "FILES", {(tmp_path / "none.yaml").as_uri(): "0" * 64})
    monkeypatch.setattr(crds, "FOLDER", tmp_path / "crds")
    assert crds.main() == 1
    assert "none.yaml" in capsys.readouterr().err
