"""The real code, on the real S3 server, each of its requests judged by the policies first: what it needs, it has."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from botocore.model import OperationModel
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from components.prepare.dataset import Message, Record
from components.records import runs
from components.records.steps import Decision, Evaluation, Measured
from components.registry import signing
from components.registry.aliases import Cause, promote, read_alias, rollback
from components.registry.versions import Version, list_versions, publish_version
from components.report.registry_page import write_pages
from components.shared.errors import StoreError
from components.store.store import Store
from tests.doubles import datasets
from tests.infra.aws.iam import Request, allows, put
from tests.infra.aws.terraform import BUCKET_ARN, Configuration

# The API reference's tables of the permission that an operation needs.
READS = {"GetObject": "s3:GetObject", "HeadObject": "s3:GetObject", "ListObjectsV2": "s3:ListBucket"}
DENIED = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
DELETES = {"AbortMultipartUpload": "s3:AbortMultipartUpload", "DeleteObject": "s3:DeleteObject"}


@contextmanager
def acting_as(role: str, store: Store) -> Iterator[list[Request]]:
    """Refuse what the role may not do, as S3 would; gives what was asked."""
    configuration, asked = Configuration(prefix=store.prefix), []

    def judge(params: Mapping[str, Any], model: OperationModel, **_: object) -> None:
        wanted = requests(model.name, params)
        asked.extend(wanted)
        if not all(allows(configuration, role, found) for found in wanted):
            raise ClientError(DENIED, model.name)

    events = store._client.meta.events
    events.register("provide-client-params.s3", judge)
    try:
        yield asked
    finally:
        events.unregister("provide-client-params.s3", judge)


def requests(operation: str, params: Mapping[str, Any]) -> list[Request]:
    """What IAM is asked for one call."""
    if operation == "DeleteObjects":
        return [Request("s3:DeleteObject", f"{BUCKET_ARN}/{each['Key']}") for each in params["Delete"]["Objects"]]
    arn = f"{BUCKET_ARN}/{params['Key']}" if "Key" in params else BUCKET_ARN
    if action := (READS | DELETES).get(operation):
        return [Request(action, arn)]
    assert operation in ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"), operation
    part = operation in ("CreateMultipartUpload", "UploadPart")
    return [put(arn, if_match="IfMatch" in params, if_none_match="IfNoneMatch" in params, part=part)]


def publish(store: Store, weights: bytes = b"weights") -> Version:
    files = {"adapter_model.safetensors": weights, "adapter_config.json": b"{}"}
    return publish_version(store, "icd", files, lineage={"run_id": "r1"})


def make_dataset(store: Store) -> None:
    records = [Record(str(n), [Message("user", f"question {n}")], "answer") for n in range(4)]
    datasets.publish(store, train=records[:3], evaluation=records[3:])


def test_the_trainer_does_all_that_a_training_does(store: Store, tmp_path: Path) -> None:
    large = tmp_path / "optimizer.safetensors"
    large.write_bytes(bytes(33 * 2**20))
    key = "runs/r1/checkpoints/7/rank-0/optimizer.safetensors"
    with acting_as("trainer", store) as asked:
        store.check()
        make_dataset(store)
        store.put(key, large)
        store.delete([key])
        version = publish(store)
    assert sum(request.context.get("s3:ObjectCreationOperation") == "false" for request in asked) > 2  # in parts
    assert [found.version for found in list_versions(store, "icd")] == [version.version]


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
    assert pointer.version == first.version


def test_who_evaluates_measures_the_step_signs_and_decides_and_who_trains_does_neither(store: Store) -> None:
    version, (versions_key, evaluations_key) = publish(store), (Ed25519PrivateKey.generate() for _ in range(2))
    store.trusted_keys, store.evaluation_keys = ((signing.public_text(key),) for key in (versions_key, evaluations_key))
    candidate = Measured(version=version.version, metrics={"loss": 1.0})
    evaluation = Evaluation(run_id="r1", records=1, models={"candidate": candidate})
    decision = Decision(decision="hold", adapter="icd", alias="production", run_id="r1", reasons=("worse",))
    with acting_as("evaluator", store):
        runs.write(store, "r1", evaluation)
    for role, record in (("trainer", evaluation), ("trainer", decision), ("evaluator", decision)):
        with acting_as(role, store), pytest.raises(StoreError, match="AccessDenied"):
            runs.write(store, "r1", record)
    with acting_as("pipeline", store), pytest.raises(StoreError, match="AccessDenied"):
        runs.write(store, "r1", evaluation)
    for role in ("trainer", "evaluator"):
        with acting_as(role, store), pytest.raises(StoreError, match="AccessDenied"):
            signing.sign_evaluation(store, "icd", "r1", evaluations_key)
    with acting_as("pipeline", store):
        signing.sign_evaluation(store, "icd", "r1", evaluations_key)
        runs.write(store, "r1", decision)
    sha256 = hashlib.sha256(store.get("evaluations/r1/evaluation.json")).hexdigest()
    measured = signing.require_evaluated(store, "icd", version.version, "r1", sha256)
    assert measured == version.manifest_sha256
