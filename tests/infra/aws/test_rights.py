"""Who may read, write and delete which key, as a table."""

from collections.abc import Iterator

import pytest

from components.records import runs
from components.registry.aliases import adapter_key, version_key
from tests.infra.aws.iam import ROLES, STRANGER, Request, allows, put
from tests.infra.aws.terraform import BUCKET_ARN, Configuration

VERSION = version_key("icd", "v1")
FORMS = {"put": {}, "create": {"if_none_match": True}, "swap": {"if_match": True}, "put a part of": {"part": True}}
PLAIN = {
    runs.run_key("r1", runs.CONFIG): "trainer pipeline",
    "runs/r1/checkpoints/7/rank-0/optimizer.safetensors": "trainer pipeline",
    f"{runs.EVALUATIONS}r1/{runs.EVALUATION}": "evaluator",
    f"{runs.EVALUATIONS}r1/{runs.EVALUATION_RECORDS}": "evaluator",
    f"{runs.EVALUATIONS}r1/{runs.RAY_EVALUATE}/snapshot.json": "evaluator",
    f"{runs.EVALUATIONS}r1/{runs.EVALUATION_SIGNATURE}": "pipeline",
    f"{runs.EVALUATIONS}r1/{runs.DECISION}": "pipeline",
    adapter_key("icd", "rates", "qlora.json"): "pipeline",
    adapter_key("icd", "index", "adapter.json.gz"): "pipeline admin",
    "pages/changed/icd": "trainer pipeline admin",
    "pages/index.json": "pipeline admin",
    "pages/icd.html": "pipeline",
    ".check/probe": "trainer pipeline admin",
    "elsewhere/x": "",
}
CREATED = {
    "datasets/d1/train/0.parquet": "trainer pipeline",
    "bases/b1/model.safetensors": "trainer",
    f"{VERSION}/adapter_model.safetensors": "trainer",
    f"{VERSION}/manifest.json": "trainer",
    "runs/r1/checkpoints/7/shared/manifest.json": "trainer pipeline",
    adapter_key("icd", "events", "2026-e1.json"): "trainer pipeline admin",
    adapter_key("icd", "signatures", "v1", "k-s.dsse.json"): "pipeline admin",
    f"erased/{'0' * 64}.json": "admin",
}
SWAPPED = {
    adapter_key("icd", "aliases", "production.json"): "pipeline admin",
    adapter_key("icd", "watermark.json"): "pipeline admin",
}
WRITERS = [(PLAIN, {*FORMS}), (CREATED, {"create", "put a part of"}), (SWAPPED, {"create", "swap", "put a part of"})]
"""Who writes a key at all, and in which forms."""
DELETERS = {
    "runs/r1/checkpoints/7/shared/manifest.json": "trainer admin stranger",
    "runs/r1/decision.json": "admin stranger",
    ".check/probe": "trainer pipeline admin stranger",
    f"{runs.EVALUATIONS}r1/{runs.EVALUATION}": "admin",
    f"{VERSION}/manifest.json": "admin",
    "datasets/d1/train/0.parquet": "admin",
    "bases/b1/model.safetensors": "admin",
    adapter_key("icd", "aliases", "production.json"): "",
    adapter_key("icd", "watermark.json"): "",
    adapter_key("icd", "events", "2026-e1.json"): "",
    f"erased/{'0' * 64}.json": "",
}


def table(who: str, root: str) -> Iterator[tuple[str, Request, bool]]:
    """What may be asked for, the request, and whether it is to be allowed; `root` is the ARN of the registry."""
    is_stranger = who == STRANGER
    for keys, forms in WRITERS:
        for key, writers in keys.items():
            for form, headers in FORMS.items():
                is_writer = who in writers.split() or is_stranger
                yield f"{form} {key}", put(f"{root}/{key}", **headers), is_writer and form in forms
            yield f"read {key}", Request("s3:GetObject", f"{root}/{key}"), True
            yield f"read {key} bare", Request("s3:GetObject", f"{root}/{key}", {"aws:SecureTransport": "false"}), False
    for key, deleters in DELETERS.items():
        yield f"delete {key}", Request("s3:DeleteObject", f"{root}/{key}"), who in deleters.split()
        forever = Request("s3:DeleteObjectVersion", f"{root}/{key}")
        yield f"delete {key} for good", forever, is_stranger and key.startswith((".check", "runs"))
    yield "list the bucket", Request("s3:ListBucket", BUCKET_ARN), True
    yield "change the bucket's policy", Request("s3:PutBucketPolicy", BUCKET_ARN), is_stranger
    yield "read another bucket", Request("s3:GetObject", "arn:aws:s3:::claims/2026/x"), is_stranger


def wrong(configuration: Configuration, root: str = BUCKET_ARN) -> list[str]:
    return [
        f"{who} {'may not' if allowed else 'may'} {what}"
        for who in (*ROLES, STRANGER)
        for what, request, allowed in table(who, root)
        if allows(configuration, who, request) != allowed
    ]


@pytest.mark.parametrize("prefix", ["", "team-a/models"])
def test_every_role_may_do_what_the_table_says_and_no_more(prefix: str) -> None:
    assert wrong(Configuration(prefix=prefix), f"{BUCKET_ARN}/{prefix}".rstrip("/")) == []


CLAIMS, KEY = "arn:aws:s3:::claims", "arn:aws:kms:eu-central-1:111122223333:key/0f"
RUN = f"{BUCKET_ARN}/runs/r1/x"
BESIDE = [put(RUN), Request("s3:GetObject", RUN), Request("kms:Decrypt", KEY)]


@pytest.mark.parametrize(
    ("configuration", "allowed", "refused"),
    [
        (Configuration(prefix="team-a"), [], BESIDE),
        (
            Configuration(source_arns=[f"{CLAIMS}/2026/*"]),
            [Request("s3:GetObject", f"{CLAIMS}/2026/x"), Request("s3:ListBucket", CLAIMS)],
            [Request("s3:GetObject", f"{CLAIMS}/2025/x"), put(f"{CLAIMS}/2026/x")],
        ),
        (
            Configuration(kms_key_arn=KEY),
            [Request("kms:Decrypt", KEY), Request("kms:GenerateDataKey", KEY)],
            [Request("kms:ScheduleKeyDeletion", KEY)],
        ),
    ],
    ids=["a folder of the bucket", "sources outside it", "a key of one's own"],
)
def test_what_variables_give_is_for_every_role_and_no_more_than_that(
    configuration: Configuration, allowed: list[Request], refused: list[Request]
) -> None:
    for who in ROLES:
        assert [request for request in allowed + refused if allows(configuration, who, request)] == allowed
