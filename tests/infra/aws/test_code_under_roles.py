"""The real code, on the real S3 server, each of its requests judged by the policies first: what it needs, it has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse

from components.prepare import dataset
from components.prepare.dataset import Message, Record
from components.registry.aliases import Cause, promote, read_alias, rollback
from components.registry.versions import Version, list_versions, publish_version
from components.report.registry_page import write_pages
from components.shared.errors import StoreError
from components.store.store import Store
from tests.infra.aws.iam import Request, allows, put
from tests.infra.aws.terraform import BUCKET_ARN, Configuration, source

SOURCE = source()
DENIED = b"<Error><Code>AccessDenied</Code><Message>denied by the policies of infra/aws</Message></Error>"


class Body(BytesIO):
    def stream(self, **_: object) -> Iterator[bytes]:
        yield self.read()


@contextmanager
def acting_as(role: str, store: Store) -> Iterator[list[Request]]:
    """Refuse what the role may not do, as S3 would; gives what was asked."""
    configuration, asked = Configuration(SOURCE, store.prefix), []

    def judge(request: AWSPreparedRequest, **_: object) -> AWSResponse | None:
        wanted = requests(request, store.bucket)
        asked.extend(wanted)
        if all(allows(configuration, role, found) for found in wanted):
            return None
        return AWSResponse(request.url, 403, {"content-type": "application/xml"}, Body(DENIED))

    events = store._client.meta.events
    events.register("before-send.s3", judge)
    try:
        yield asked
    finally:
        events.unregister("before-send.s3", judge)


def requests(sent: AWSPreparedRequest, bucket: str) -> list[Request]:
    """The permissions that one HTTP request needs, by the API reference's tables."""
    url = urlsplit(sent.url)
    query = parse_qs(url.query, keep_blank_values=True)
    key = unquote(url.path).removeprefix(f"/{bucket}").removeprefix("/")
    arn = f"{BUCKET_ARN}/{key}" if key else BUCKET_ARN
    if sent.method in ("GET", "HEAD"):
        return [Request("s3:GetObject" if key else "s3:ListBucket", arn)]
    if sent.method == "POST" and "delete" in query:
        keys = [found.text for found in ElementTree.fromstring(sent.body).iter() if found.tag.endswith("Key")]
        return [Request("s3:DeleteObject", f"{BUCKET_ARN}/{found}") for found in keys]
    if sent.method in ("PUT", "POST"):
        headers = {name.lower() for name in sent.headers}
        part = "partNumber" in query or "uploads" in query
        return [put(arn, if_match="if-match" in headers, if_none_match="if-none-match" in headers, part=part)]
    assert sent.method == "DELETE"
    return [Request("s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject", arn)]


def publish(store: Store, weights: bytes = b"weights") -> Version:
    files = {"adapter_model.safetensors": weights, "adapter_config.json": b"{}"}
    return publish_version(store, "icd", files, lineage={"run_id": "r1"})


def make_dataset(store: Store) -> None:
    records = [Record(str(n), [Message("user", f"question {n}")], "answer") for n in range(4)]
    dataset.publish(store, train=records[:3], evaluation=records[3:], rejects=[], profile={})


def test_the_trainer_checks_the_store_makes_a_dataset_and_publishes_a_version(store: Store) -> None:
    with acting_as("trainer", store) as asked:
        store.check()
        make_dataset(store)
        version = publish(store)
    assert {request.action for request in asked} == {
        "s3:ListBucket",
        "s3:GetObject",
        "s3:PutObject",
        "s3:DeleteObject",
    }
    assert [found.version for found in list_versions(store, "icd")] == [version.version]


def test_the_trainer_uploads_in_parts_and_drops_checkpoints(store: Store, tmp_path: Path) -> None:
    large = tmp_path / "optimizer.safetensors"
    large.write_bytes(bytes(33 * 2**20))
    key = "runs/r1/checkpoints/7/rank-0/optimizer.safetensors"
    with acting_as("trainer", store) as asked:
        store.put(key, large)
        store.delete([key])
    assert sum(request.context.get("s3:ObjectCreationOperation") == "false" for request in asked) > 2


def test_the_pipeline_promotes_and_people_roll_back(store: Store) -> None:
    with acting_as("trainer", store):
        first, second = publish(store, b"one"), publish(store, b"two")
    with acting_as("pipeline", store):
        make_dataset(store)
        store.put_json("runs/r1/decision.json", {})
        promote(store, "icd", first.version)
        promote(store, "icd", second.version, expected=first.version)
        write_pages(store, "icd", generated_at="now")
    with acting_as("admin", store):
        rollback(store, "icd", cause=Cause(reason="wrong"))
        store.delete([f"adapters/icd/versions/{second.version}/manifest.json"])
    pointer = read_alias(store, "icd", "production")
    assert pointer
    assert pointer.version == first.version


@pytest.mark.parametrize(
    ("role", "act"),
    [
        ("trainer", lambda store, version: promote(store, "icd", version.version)),
        ("pipeline", lambda store, version: publish(store, b"other")),
        ("admin", lambda store, version: publish(store, b"other")),
        ("trainer", lambda store, version: store.delete([f"adapters/icd/versions/{version.version}/manifest.json"])),
        ("pipeline", lambda store, version: store.delete(["runs/r1/decision.json"])),
        ("pipeline", lambda store, version: store.put("adapters/icd/aliases/production.json", b"{}")),
        ("trainer", lambda store, version: store.put(f"adapters/icd/versions/{version.version}/manifest.json", b"{}")),
    ],
    ids=["promote", "publish", "publish", "delete a version", "delete a decision", "overwrite an alias", "a manifest"],
)
def test_what_is_not_a_roles_to_do_is_refused(store: Store, role: str, act: Callable[[Store, Version], object]) -> None:
    version = publish(store)
    with acting_as(role, store), pytest.raises(StoreError, match="AccessDenied"):
        act(store, version)
    assert [found.version for found in list_versions(store, "icd")] == [version.version]
    assert read_alias(store, "icd", "production") is None
