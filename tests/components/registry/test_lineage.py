import gzip
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from components.config.schema import RunConfig
from components.registry import cache, lineage
from components.registry.lineage import Asked, Base, Code, Dataset, Environment, Hardware, Lineage, Started, Training
from components.registry.versions import Version, ancestors, descendants, tree
from components.shared.errors import UserError
from components.store.store import Store
from tests.components.registry import adapters


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_lineage_says_what_the_adapter_was_made_from() -> None:
    sections = {"adapter": {"name": "icd"}, "model": {"base": "org/base"}, "data": {"source": "data.jsonl"}}
    config = RunConfig.model_validate(sections)
    lineage = Lineage(
        Asked.of(config),
        run_id="r1",
        base=Base("org/base", {"commit": "abc"}),
        dataset=Dataset("d1", "s3://b/datasets/d1", "0" * 64, 90, 10),
        environment=Environment("3.11.9", "Linux", {"torch": "2.13"}, Code("c0ffee", True)),
        hardware=Hardware("EPYC 9R14", cpus_per_worker=4, workers=2, gpu="NVIDIA A10G"),
        started=Started("ann", kfp_run_id="k1", submission_id="r1-candidate-1", ray_job_id="02000000"),
        recipe={"trainable_parameters": 1000},
        training=Training(10, 5000, 0.5, None, 12.5, 2),
        parents=["s3://b/adapters/icd/versions/v0"],
    ).as_json()
    assert json.loads(json.dumps(lineage, allow_nan=False)) == lineage
    assert RunConfig.model_validate(lineage["config"]).digest == config.digest
    assert {
        "schema_version": 1,
        "run_id": "r1",
        "adapter": "icd",
        "config_sha256": config.digest,
        "base": {"reference": "org/base", "identity": {"commit": "abc"}},
        "hardware": {"cpu": "EPYC 9R14", "cpus_per_worker": 4, "workers": 2, "gpu": "NVIDIA A10G"},
        "started": {"user": "ann", "kfp_run_id": "k1", "submission_id": "r1-candidate-1", "ray_job_id": "02000000"},
        "recipe": {"method": "qlora", "trainable_parameters": 1000},
        "parents": ["s3://b/adapters/icd/versions/v0"],
        "sources": {},
    }.items() <= lineage.items()
    assert "asked" not in lineage
    assert lineage["dataset"]["manifest_sha256"] == "0" * 64
    assert lineage["environment"]["code"] == {"commit": "c0ffee", "dirty": True, "url": ""}
    assert (lineage["training"]["tokens"], lineage["training"]["eval_loss"]) == (5000, None)


def test_the_code_is_that_of_the_checkout_and_says_when_it_was_changed(tmp_path: Path) -> None:
    assert lineage.code_of(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert lineage.code_of(tmp_path) is None  # no commit yet
    (tmp_path / "a.py").write_text("1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    git(tmp_path, "remote", "add", "origin", "https://me:secret@example.org/repo.git")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert lineage.code_of(tmp_path) == Code(commit, False, "https://example.org/repo.git")
    (tmp_path / "a.py").write_text("2\n")
    assert lineage.code_of(tmp_path) == Code(commit, True, "https://example.org/repo.git")


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://user:token@host:8443/a/b", "https://host:8443/a/b"),
        ("https://token@host/a", "https://host/a"),
        ("https://host/a@b", "https://host/a@b"),
        ("git@github.com:a/b.git", "git@github.com:a/b.git"),
        ("", ""),
    ],
)
def test_no_credentials_of_an_address_are_kept(url: str, kept: str) -> None:
    assert lineage.without_credentials(url) == kept


def test_every_package_is_named_as_pip_lists_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried = tmp_path / "thirdparty_files" / "carried-1.0.dist-info"  # as importing Ray puts on the path
    carried.mkdir(parents=True)
    (carried / "METADATA").write_text("Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(carried.parent))
    pip = [sys.executable, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(pip, check=True, capture_output=True, cwd=tmp_path).stdout)
    described = lineage.environment(tmp_path, image="registry/fineloop@sha256:00")
    assert described.packages == {canonicalize_name(each["name"]): each["version"] for each in listed}
    assert (described.python, described.code) == (platform.python_version(), None)
    assert described.image == "registry/fineloop@sha256:00"


COMMIT = "c0ffee42" * 5


@pytest.mark.parametrize(
    ("revision", "code"),
    [
        (COMMIT, Code(COMMIT, dirty=False)),
        (f"{COMMIT}-dirty", Code(COMMIT, dirty=True)),
        ("unknown", None),
        ("c0ffee4", None),
        ("", None),
    ],
)
def test_outside_a_checkout_the_code_is_the_images_revision(tmp_path: Path, revision: str, code: Code | None) -> None:
    assert lineage.environment(tmp_path, revision=revision).code == code


def published(store: Store, number: int, *parents: str) -> Version:
    return adapters.published(
        store,
        b"%d" % number,
        run_id=f"r{number}",
        dataset={"dataset_id": f"d{number % 2}"},
        config={"data": {"source": ["s3://data/a/", f"s3://data/{number}/"]}},
        sources={f"part-{number}.jsonl": "etag"},
        base={"reference": "org/base"},
        environment={"code": None},
        parents=list(parents),
    )


def test_lineage_leads_forward_through_parents_and_back_from_what_was_used(store: Store) -> None:
    zero = published(store, 0)
    one = published(store, 1, zero.uri, "s3://elsewhere/adapters/x/versions/v1")
    published(store, 2)
    found = ancestors(store, one)
    assert [each.version for each, _ in found] == [one.version, zero.version]
    drawn = "\n".join(tree(found))
    assert f"icd {zero.version}" in drawn
    assert "dataset d1" in drawn

    def made_of(*terms: str) -> list[str]:
        return [each.run_id for each in descendants(store, "icd", lineage.parse_terms(terms))]

    assert made_of("dataset=d0") == ["r2", "r0"]
    assert made_of("source=s3://data/a/") == ["r2", "r1", "r0"]
    assert made_of("source=s3://data/a/", "dataset=d1") == ["r1"]
    assert made_of("source=part-2.jsonl") == ["r2"]
    assert made_of(f"parent={zero.uri}") == ["r1"]
    assert made_of("base=org/b", "dataset=d") == ["r2", "r1", "r0"]
    assert made_of("commit=1234") == []
    with pytest.raises(UserError, match="--of data=d0: write KIND=NAME, where KIND is one of dataset, source"):
        lineage.parse_terms(["data=d0"])


def test_an_index_is_made_and_believed_as_far_as_it_goes_and_made_anew_when_it_is_junk(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def read(each: str) -> str | None:
        asked.append(each)
        return None if each == "absent" else f"said of {each}"

    def remembered(*ids: str) -> tuple[dict[str, str], list[str]]:
        asked.clear()
        index = cache.Index(store, "icd", "tests", worth=1)
        known = index.of("a section", ids, read, is_so=lambda _id, value: value is not None)
        index.keep()
        return known, sorted(asked)

    assert remembered("a", "b", "absent") == ({"a": "said of a", "b": "said of b"}, ["a", "absent", "b"])
    assert remembered("b", "a", "absent")[1] == ["absent"]
    assert remembered("b", "c") == ({"b": "said of b", "c": "said of c"}, ["c"])
    store.put("adapters/icd/index/tests.json.gz", b"junk")
    assert remembered("a", "b") == ({"a": "said of a", "b": "said of b"}, ["a", "b"])
    assert remembered("a", "b")[1] == []
    monkeypatch.setattr(cache, "MAX_BYTES", 1000)
    store.put("adapters/icd/index/tests.json.gz", gzip.compress(b'{"a section": {"a": "' + b"x" * 1000 + b'"}}'))
    assert remembered("a", "b") == ({"a": "said of a", "b": "said of b"}, ["a", "b"])
