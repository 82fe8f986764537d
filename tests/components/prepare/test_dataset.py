"""Who saw a record: datasets, the versions made of them, those that grew from these, and runs that keep its text."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from components.config.schema import RunConfig
from components.prepare.dataset import (
    Message,
    Record,
    batch_of,
    completed,
    exposure_of,
    identities,
    load_split,
    require_promised,
    with_columns,
)
from components.prepare.prepare import prepare
from components.registry import signing
from components.registry.aliases import promote
from components.registry.audit import audit
from components.registry.versions import Version, publish_version
from components.shared.errors import IntegrityError
from components.store import folders
from components.store.store import Store
from tests.doubles.datasets import dataset_id, publish

Prepared = Callable[..., str]


@pytest.fixture
def dataset_of(write_rows: Callable[..., str], store: Store, run_config: Callable[..., RunConfig]) -> Prepared:
    """The id of a dataset of these rows."""

    def build(rows: list[Any], name: str) -> str:
        config = run_config(write_rows(rows, f"{name}.jsonl"), eval_share=0.3, max_reject_share=0.5)
        return prepare(config, store).dataset_id

    return build


def rows(start: int, end: int) -> list[Any]:
    return [{"id": i, "prompt": f"question {i}", "completion": f"answer {i}"} for i in range(start, end)]


def published(store: Store, name: str, weights: str, *, dataset: str = "", parents: tuple[str, ...] = ()) -> Version:
    files = {"adapter_model.safetensors": weights.encode(), "adapter_config.json": b"{}"}
    lineage = {"run_id": "", "dataset": {"dataset_id": dataset}, "parents": list(parents)}
    return publish_version(store, name, files, lineage=lineage)


def as_parquet(columns: dict[str, list[Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def test_each_dataset_is_named_with_the_part_that_holds_the_record(dataset_of: Prepared, store: Store) -> None:
    first, second, without = dataset_of(rows(0, 60), "1"), dataset_of(rows(3, 80), "2"), dataset_of(rows(50, 99), "3")
    # The judge reads every byte of every part.
    ids = {
        (dataset, part): pq.read_table(io.BytesIO(store.get(info.key)))["id"].to_pylist()
        for dataset in (first, second, without)
        for part in ("train", "eval")
        for info in store.list(f"datasets/{dataset}/{part}/")
    }
    for record_id in map(str, range(0, 60, 12)):
        holders = exposure_of(store, [record_id]).datasets
        wanted = {holder for holder, of_it in ids.items() if record_id in of_it}
        assert {(each.dataset_id, part) for each in holders for part in each.parts} == wanted
    several = exposure_of(store, ["3", "70", "none"]).datasets
    asked = {first: ("3",), second: ("3", "70"), without: ("70",)}
    assert {each.dataset_id: each.ids for each in several} == asked


def test_a_rejected_row_holds_a_record_too_and_nobody_was_trained_on_it(dataset_of: Prepared, store: Store) -> None:
    bad = [{"id": 4711, "prompt": "secret", "completion": ""}, '{"id": "4712", "prompt": "secret', '{"age": 47113}']
    dataset = dataset_of([*rows(0, 60), *bad], "1")
    published(store, "sums", "1", dataset=dataset)
    for record_id in ("4711", "4712"):
        found = exposure_of(store, [record_id])
        assert [(each.dataset_id, each.parts) for each in found.datasets] == [(dataset, ("rejects",))]
        assert found.versions == ()
    assert exposure_of(store, ["471"]).datasets == ()


def test_versions_of_the_dataset_and_those_that_grew_from_them_are_named(dataset_of: Prepared, store: Store) -> None:
    seen, other = dataset_of(rows(0, 60), "1"), dataset_of(rows(60, 120), "2")
    one = published(store, "sums", "1", dataset=seen)
    two = published(store, "sums", "2", dataset=other, parents=(one.uri,))
    three = published(store, "products", "3", dataset=other, parents=(two.uri,))
    published(store, "sums", "4", dataset=other)
    promote(store, "sums", one.version)
    promote(store, "products", three.version, "staging")
    found = {each.uri: each for each in exposure_of(store, ["5"]).versions}
    assert {uri: (each.why, each.dataset_id, each.aliases) for uri, each in found.items()} == {
        one.uri: ("dataset", seen, ("production",)),
        two.uri: ("parent", "", ()),
        three.uri: ("parent", "", ("staging",)),
    }
    assert exposure_of(store, ["none"]).versions == ()


def test_a_version_whose_lineage_cannot_be_read_may_have_seen_it(dataset_of: Prepared, store: Store) -> None:
    dataset_of(rows(0, 60), "1")
    version = published(store, "sums", "1")
    store.put(f"adapters/sums/versions/{version.version}/lineage.json", b"{")
    (found,) = exposure_of(store, ["5"]).versions
    assert (found.uri, found.why) == (version.uri, "unknown")


def test_a_revoked_version_is_known_as_revoked(dataset_of: Prepared, store: Store) -> None:
    key = Ed25519PrivateKey.generate()
    version = published(store, "sums", "1", dataset=dataset_of(rows(0, 60), "1"))
    store.trusted_keys = (signing.public_text(key),)
    (before,) = exposure_of(store, ["5"]).versions
    signing.revoke(store, "sums", version.version, key, reason="erased")
    assert exposure_of(store, ["5"]).versions == (replace(before, revoked=True),)
    assert before.revoked is False


def test_a_run_that_evaluated_on_it_keeps_its_text(store: Store) -> None:
    columns = {"id": ["1", "4711"], "prompt": [json.dumps("q")] * 2, "answer_tokens": [1, 1]}
    store.put("runs/a/evaluation_records.parquet", as_parquet(columns))
    store.put("runs/b/evaluation_records.parquet", as_parquet({**columns, "id": ["1", "2"]}))
    assert exposure_of(store, ["4711"]).runs == ("a",)


@pytest.mark.parametrize("body", [b"junk", as_parquet({"text": ["x"]})])
def test_a_file_that_cannot_be_searched_hides_no_other(body: bytes, dataset_of: Prepared, store: Store) -> None:
    dataset = dataset_of(rows(0, 60), "1")
    store.put("datasets/d0/train/part-00000.parquet", body)
    found = exposure_of(store, ["5"])
    assert found.unread == (store.uri("datasets/d0/train/part-00000.parquet"),)
    assert [each.dataset_id for each in found.datasets] == [dataset]


A = Record("a", [Message("user", "p")], "x")
B = Record("b", [Message("system", "s"), Message("user", "p")], "y")


def test_the_id_is_fixed_by_the_records() -> None:
    assert dataset_id([A], [B]) == "d8e56802e8e36d3e"


def test_tools_calls_and_groups_survive_the_store(store) -> None:
    called = Message("assistant", "", '{"tool_calls":[{"type":"function","function":{"name":"f","arguments":{}}}]}')
    result = Message("tool", "rain", '{"tool_call_id":"call12345"}')
    talk = Record("c", [Message("user", "p"), called, result], "x", tools='[{"name":"f"}]')
    asks = Record("d", [Message("user", "p")], "", calls='[{"function":{"name":"f","arguments":{}}}]')
    grouped = Record("e", [Message("user", "p")], "x", group="g")
    uri = publish(store, train=[A, talk], evaluation=[asks, grouped, B]).uri
    assert load_split(store, uri, "train") == [A, talk]
    assert load_split(store, uri, "eval") == [asks, grouped, B]


def test_what_was_made_of_a_dataset_that_is_gone_is_no_part_of_it_when_it_comes_again(store) -> None:
    """Whoever removed it was cut off after the manifests."""
    folder = publish(store, train=[A], evaluation=[B])
    key = store.key(folder.uri)
    files = folders.read_manifest(store, key).files
    store.put(f"{key}/tokens/0123/tokens.npy", b"1")
    store.delete([f"{key}/manifest.json"])
    again = publish(store, train=[A], evaluation=[B])
    assert (again.dataset_id, again.uri, again.created) == (folder.dataset_id, folder.uri, True)
    manifest = folders.read_manifest(store, key)
    assert manifest.files == files
    assert again.manifest_sha256 == manifest.sha256 != folder.manifest_sha256  # it says when it was made


def planted(store: Store, uri: str, split: str, **about: Any) -> None:
    """Replace the answers of a split, with a manifest that fits, as whoever may write there can."""
    key = store.key(uri)
    manifest = store.get_json(f"{key}/manifest.json")
    path = f"{split}/part-00000.parquet"
    table = pq.read_table(io.BytesIO(store.get(f"{key}/{path}")))
    answers = pa.array(["PLANTED"] * len(table), pa.string())
    sink = io.BytesIO()
    pq.write_table(table.set_column(table.schema.get_field_index("answer"), "answer", answers), sink)
    store.put(f"{key}/{path}", sink.getvalue())
    manifest["files"][path] = folders.digest_of(sink.getvalue())
    manifest["about"] |= about
    store.put_json(f"{key}/manifest.json", manifest)


@pytest.mark.parametrize("split", ["train", "eval", "replay"])
def test_records_that_were_planted_with_a_fitting_manifest_are_refused_by_name(store: Store, split: Any) -> None:
    uri = publish(store, train=[A], evaluation=[B], replay=[A]).uri
    planted(store, uri, split)
    with pytest.raises(IntegrityError, match=rf"{uri} has other records in {split}/"):
        load_split(store, uri, split)
    with pytest.raises(IntegrityError, match=rf"{uri} has other records"):
        require_promised(store, uri)
    for other in {"train", "eval", "replay"} - {split}:
        assert load_split(store, uri, cast(Any, other))


def test_the_hashes_that_a_manifest_lists_are_held_against_the_id(store: Store) -> None:
    uri = publish(store, train=[A], evaluation=[B]).uri
    planted(store, uri, "train", splits={"train": "0" * 64, "eval": "0" * 64})
    for split in ("train", "eval"):
        with pytest.raises(IntegrityError, match=f"{uri} has other records in {split}/"):
            load_split(store, uri, cast(Any, split))


def test_a_row_without_a_text_cannot_hide_from_the_id(store: Store) -> None:
    rows = completed(with_columns(batch_of([A, B]), frozenset()))
    hidden = rows.set_column(rows.schema.get_field_index("answer"), "answer", pa.array(["x", None]))
    with pytest.raises(IntegrityError, match="lack a text"):
        identities(hidden)


def test_a_dataset_of_the_former_format_is_read_and_checked_by_all_its_splits(store: Store) -> None:
    own = publish(store, train=[A], evaluation=[B])
    former = "d1770dff0ee6de82"
    manifest = store.get_json(f"datasets/{own.dataset_id}/manifest.json")
    manifest["about"] |= {"format": 1}
    del manifest["about"]["splits"]
    for path in manifest["files"]:
        store.put(f"datasets/{former}/{path}", store.get(f"datasets/{own.dataset_id}/{path}"))
    store.put_json(f"datasets/{former}/manifest.json", manifest)
    uri = store.uri(f"datasets/{former}")
    assert (load_split(store, uri, "train"), load_split(store, uri, "eval")) == ([A], [B])
    planted(store, uri, "eval")
    for split in ("train", "eval"):
        with pytest.raises(IntegrityError, match=uri):
            load_split(store, uri, cast(Any, split))


def test_an_existing_folder_is_taken_for_the_dataset_only_with_its_records(store: Store) -> None:
    uri = publish(store, train=[A], evaluation=[B]).uri
    assert publish(store, train=[A], evaluation=[B]).uri == uri
    planted(store, uri, "eval")
    with pytest.raises(IntegrityError, match=f"{uri} has other records in eval/"):
        publish(store, train=[A], evaluation=[B])


def test_an_audit_reads_the_records_that_a_version_was_made_of(store: Store) -> None:
    found = publish(store, train=[A], evaluation=[B])
    published(store, "sums", "1", dataset=found.dataset_id)
    assert audit(store, "sums", require_promised).findings == ()
    planted(store, found.uri, "eval")
    (finding,) = audit(store, "sums", require_promised).findings
    assert finding.where == found.uri
    assert "has other records in eval/" in finding.what
