"""What a version was made of, and which versions were made of something."""

import gzip

import pytest

from components.registry import cache
from components.registry.lineage import parse_terms
from components.registry.versions import Version, ancestors, descendants, publish_version, tree
from components.shared.errors import UserError
from components.store.store import Store


def published(store: Store, number: int, *, parents: tuple[str, ...] = ()) -> Version:
    files = {"adapter_model.safetensors": b"%d" % number, "adapter_config.json": b"{}"}
    lineage = {
        "run_id": f"r{number}",
        "dataset": {"dataset_id": f"d{number % 2}"},
        "config": {"data": {"source": ["s3://data/a/", f"s3://data/{number}/"]}},
        "sources": {f"part-{number}.jsonl": "etag"},
        "base": {"reference": "org/base"},
        "environment": {"code": None},
        "parents": list(parents),
    }
    return publish_version(store, "icd", files, lineage=lineage)


def test_lineage_leads_forward_through_parents_and_back_from_what_was_used(store: Store) -> None:
    zero = published(store, 0)
    one = published(store, 1, parents=(zero.uri, "s3://elsewhere/adapters/x/versions/v1"))
    published(store, 2)
    found = ancestors(store, one)
    assert [each.version for each, _ in found] == [one.version, zero.version]
    drawn = "\n".join(tree(found))
    assert f"icd {zero.version}" in drawn
    assert "dataset d1" in drawn

    def made_of(*terms: str) -> list[str]:
        return [each.run_id for each in descendants(store, "icd", parse_terms(terms))]

    assert made_of("dataset=d0") == ["r2", "r0"]
    assert made_of("source=s3://data/a/") == ["r2", "r1", "r0"]
    assert made_of("source=s3://data/a/", "dataset=d1") == ["r1"]
    assert made_of("source=part-2.jsonl") == ["r2"]
    assert made_of(f"parent={zero.uri}") == ["r1"]
    assert made_of("base=org/b", "dataset=d") == ["r2", "r1", "r0"]
    assert made_of("commit=1234") == []
    with pytest.raises(UserError, match="--of data=d0: write KIND=NAME, where KIND is one of dataset, source"):
        parse_terms(["data=d0"])


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
