"""Who may write which key, as a table; each rule of the policies is taken away once and the table seen to notice."""

from dataclasses import dataclass

import pytest

from components.records import runs
from components.registry.aliases import adapter_key, version_key
from tests.infra.aws.iam import ROLES, STRANGER, Request, allows, put
from tests.infra.aws.terraform import BUCKET_ARN, Configuration, source

SOURCE = source()
ANYBODY = (*ROLES, STRANGER)
VERSION = version_key("icd", "v1")
PLAIN = {
    runs.run_key("r1", runs.CONFIG): "trainer pipeline",
    "runs/r1/evaluation.json": "trainer pipeline",
    "runs/r1/checkpoints/7/rank-0/optimizer.safetensors": "trainer pipeline",
    adapter_key("icd", "rates", "qlora.json"): "pipeline",
    adapter_key("icd", "index", "events.json.gz"): "pipeline admin",
    ".check/probe": "trainer pipeline admin",
    "elsewhere/x": "",
    "adapters/icd": "",
}
CREATED = {
    "datasets/d1/train/0.parquet": "trainer pipeline",
    "bases/b1/model.safetensors": "trainer",
    f"{VERSION}/adapter_model.safetensors": "trainer",
    "datasets/d1/manifest.json": "trainer pipeline",
    "bases/b1/manifest.json": "trainer",
    f"{VERSION}/manifest.json": "trainer",
    "runs/r1/checkpoints/7/shared/manifest.json": "trainer pipeline",
    adapter_key("icd", "events", "2026-e1.json"): "trainer pipeline admin",
    adapter_key("icd", "signatures", "v1", "k-s.dsse.json"): "pipeline admin",
}
SWAPPED = {
    adapter_key("icd", "aliases", "production.json"): "pipeline admin",
    adapter_key("icd", "aliases", "staging.json"): "pipeline admin",
    adapter_key("icd", "watermark.json"): "pipeline admin",
}
DELETED = {
    "runs/r1/checkpoints/7/shared/manifest.json": "trainer admin stranger",
    "runs/r1/decision.json": "admin stranger",
    ".check/probe": "trainer pipeline admin stranger",
    f"{VERSION}/manifest.json": "admin",
    "datasets/d1/train/0.parquet": "admin",
    "bases/b1/model.safetensors": "admin",
    adapter_key("icd", "aliases", "production.json"): "",
    adapter_key("icd", "watermark.json"): "",
    adapter_key("icd", "events", "2026-e1.json"): "",
}


ONCE = (  # what is written once
    '      "${local.root}*/manifest.json",\n',
    '      "${local.root}adapters/*/events/*",\n      "${local.root}datasets/*",\n',
    '      "${local.root}bases/*",\n      "${local.root}adapters/*/versions/*",\n    ]\n\n    principals',
)


@dataclass(frozen=True)
class Case:
    who: str
    what: str
    request: Request
    allowed: bool

    def __str__(self) -> str:
        return f"{self.who} {'may' if self.allowed else 'may not'} {self.what}"


def cases(prefix: str = "") -> list[Case]:
    def arn(key: str) -> str:
        return f"{BUCKET_ARN}/{prefix}/{key}" if prefix else f"{BUCKET_ARN}/{key}"

    found = []
    for who in ANYBODY:
        everything = who == STRANGER
        for key, writers in PLAIN.items():
            may = who in writers.split() or everything
            found += [
                Case(who, f"put {key}", put(arn(key)), may),
                Case(who, f"put a part of {key}", put(arn(key), part=True), may),
            ]
        for key, writers in CREATED.items():
            may = who in writers.split() or everything
            found += [
                Case(who, f"create {key}", put(arn(key), if_none_match=True), may),
                Case(who, f"put a part of {key}", put(arn(key), part=True), may),
                Case(who, f"overwrite {key}", put(arn(key)), False),
                Case(who, f"swap {key}", put(arn(key), if_match=True), False),
            ]
        for key, writers in SWAPPED.items():
            may = who in writers.split() or everything
            found += [
                Case(who, f"create {key}", put(arn(key), if_none_match=True), may),
                Case(who, f"swap {key}", put(arn(key), if_match=True), may),
                Case(who, f"overwrite {key}", put(arn(key)), False),
            ]
        for key, deleters in DELETED.items():
            found.append(Case(who, f"delete {key}", Request("s3:DeleteObject", arn(key)), who in deleters.split()))
            forever = everything and key.startswith((".check", "runs"))
            found.append(Case(who, f"delete {key} for good", Request("s3:DeleteObjectVersion", arn(key)), forever))
        for key in (*PLAIN, *CREATED, *SWAPPED):
            found.append(Case(who, f"read {key}", Request("s3:GetObject", arn(key)), True))
            bare = Request("s3:GetObject", arn(key), {"aws:SecureTransport": "false"})
            found.append(Case(who, f"read {key} without TLS", bare, False))
        found += [
            Case(who, "list the bucket", Request("s3:ListBucket", BUCKET_ARN), True),
            Case(who, "change the bucket's policy", Request("s3:PutBucketPolicy", BUCKET_ARN), everything),
            Case(who, "read another bucket", Request("s3:GetObject", "arn:aws:s3:::claims/2026/x"), everything),
        ]
    return found


def wrong(configuration: Configuration, prefix: str = "") -> list[str]:
    return [str(case) for case in cases(prefix) if allows(configuration, case.who, case.request) != case.allowed]


@pytest.mark.parametrize("prefix", ["", "team-a/models"])
def test_every_role_may_do_what_the_table_says_and_no_more(prefix: str) -> None:
    assert len(cases()) > 300
    assert wrong(Configuration(SOURCE, prefix), prefix) == []


def test_a_registry_in_a_folder_gives_no_rights_beside_it() -> None:
    configuration = Configuration(SOURCE, "team-a")
    for who in ROLES:
        for request in (put(f"{BUCKET_ARN}/runs/r1/x"), Request("s3:GetObject", f"{BUCKET_ARN}/runs/r1/x")):
            assert not allows(configuration, who, request)


def test_sources_outside_the_bucket_are_read_where_they_are_named_and_never_written() -> None:
    configuration = Configuration(SOURCE, variables={"var.source_arns": ["arn:aws:s3:::claims/2026/*"]})
    for who in ROLES:
        assert allows(configuration, who, Request("s3:GetObject", "arn:aws:s3:::claims/2026/x"))
        assert allows(configuration, who, Request("s3:ListBucket", "arn:aws:s3:::claims"))
        assert not allows(configuration, who, Request("s3:GetObject", "arn:aws:s3:::claims/2025/x"))
        assert not allows(configuration, who, put("arn:aws:s3:::claims/2026/x"))


def test_a_key_of_ones_own_is_used_by_every_role_and_by_none_without_one() -> None:
    key = "arn:aws:kms:eu-central-1:111122223333:key/0f"
    with_key = Configuration(SOURCE, variables={"var.kms_key_arn": key})
    for who in ROLES:
        for action in ("kms:Decrypt", "kms:GenerateDataKey"):
            assert allows(with_key, who, Request(action, key))
            assert not allows(Configuration(SOURCE), who, Request(action, key))
        assert not allows(with_key, who, Request("kms:ScheduleKeyDeletion", key))


@pytest.mark.parametrize(
    ("good", "bad", "noticed"),
    [
        (
            '      "${local.root}adapters/*/versions/*",\n      "${local.root}adapters/*/events/*",',
            '"${local.root}adapters/*",',
            "trainer may not swap adapters/icd/aliases/production.json",
        ),
        (
            '"${local.root}adapters/*/versions/*",\n      "${local.root}adapters/*/events/*"',
            '"${local.root}adapters/*/events/*"',
            "trainer may create adapters/icd/versions/v1/adapter_model.safetensors",
        ),
        (
            '"${local.root}datasets/*",\n      "${local.root}runs/*",\n      "${local.root}adapters/*/aliases/*"',
            '"${local.root}*",\n      "${local.root}adapters/*/aliases/*"',
            "pipeline may not create adapters/icd/versions/v1/adapter_model.safetensors",
        ),
        (
            'resources = ["${local.root}runs/*/checkpoints/*", "${local.root}.check/*"]',
            'resources = ["${local.root}*"]',
            "trainer may not delete runs/r1/decision.json",
        ),
        (
            '"${local.root}adapters/*/aliases/*", "${local.root}adapters/*/watermark.json"]',
            '"${local.root}adapters/*/watermark.json"]',
            "pipeline may not overwrite adapters/icd/aliases/production.json",
        ),
        (
            'variable = "s3:if-match"\n      values   = ["true"]',
            'variable = "s3:if-match"\n      values   = ["false"]',
            "pipeline may not overwrite adapters/icd/aliases/production.json",
        ),
        (ONCE[0], "", "trainer may not overwrite runs/r1/checkpoints/7/shared/manifest.json"),
        (ONCE[1], "", "admin may not overwrite adapters/icd/events/2026-e1.json"),
        (ONCE[1], "", "pipeline may not overwrite datasets/d1/train/0.parquet"),
        (ONCE[2], "    ]\n\n    principals", "trainer may not overwrite bases/b1/model.safetensors"),
        (ONCE[2], "    ]\n\n    principals", f"trainer may not overwrite {VERSION}/adapter_model.safetensors"),
        (
            'test     = "Bool"\n      variable = "s3:ObjectCreationOperation"\n      values   = ["true"]',
            'test     = "Null"\n      variable = "s3:nothing"\n      values   = ["true"]',
            "trainer may put a part of adapters/icd/versions/v1/manifest.json",
        ),
        (
            "values   = [aws_iam_role.admin.arn]",
            'values   = ["*"]',
            "stranger may not delete adapters/icd/aliases/production.json",
        ),
        (
            '"${local.root}adapters/*", "${local.root}datasets/*", "${local.root}bases/*"]',
            '"${local.root}adapters/*"]',
            "stranger may not delete datasets/d1/train/0.parquet",
        ),
        (
            'variable = "aws:SecureTransport"\n      values   = ["false"]',
            'variable = "aws:SecureTransport"\n      values   = ["none"]',
            "admin may not read datasets/d1/manifest.json without TLS",
        ),
        (
            'actions = ["s3:DeleteObject"]\n',
            'actions = ["s3:DeleteObject", "s3:DeleteObjectVersion"]\n',
            "admin may not delete datasets/d1/train/0.parquet for good",
        ),
        (
            'actions   = ["s3:GetObject"]\n    resources = ["${local.root}*"]',
            'actions   = ["s3:*"]\n    resources = ["${local.root}*"]',
            "trainer may not put elsewhere/x",
        ),
        (
            'actions   = ["s3:GetObject"]\n    resources = ["${local.root}*"]',
            'actions   = ["s3:GetObject"]\n    resources = ["*"]',
            "pipeline may not read another bucket",
        ),
    ],
    ids=lambda value: value if "may" in value else "",
)
def test_a_broken_policy_is_noticed(good: str, bad: str, noticed: str) -> None:
    assert good in SOURCE
    assert noticed in wrong(Configuration(SOURCE.replace(good, bad)))
