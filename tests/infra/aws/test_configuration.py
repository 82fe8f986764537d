"""Who may take a role, what the bucket does with objects, and what the variables refuse.

What `make infra-lint` asks of any bucket is not asked again: that nothing is public, versions are kept, access control
lists are off, and unfinished uploads expire.
"""

import re

import pytest

from tests.infra.aws.iam import ROLES
from tests.infra.aws.terraform import SOURCE, Configuration, Statement

CONFIGURATION = Configuration()
ISSUER, SYSTEM = CONFIGURATION.symbols["local.issuer"], "system:serviceaccount:fineloop:fineloop-"


def bucket(kind: str) -> dict[str, object]:
    return CONFIGURATION.named("resource", f"aws_s3_bucket{kind}", "registry")


def test_every_object_is_encrypted_by_the_key_that_is_given_or_by_s3s_own() -> None:
    """checkov does not evaluate the condition."""
    default = bucket("_server_side_encryption_configuration")["rule"][0]["apply_server_side_encryption_by_default"][0]
    assert default["sse_algorithm"] == '${var.kms_key_arn != "" ? "aws:kms" : "AES256"}'
    assert default["kms_master_key_id"] == '${var.kms_key_arn != "" ? var.kms_key_arn : null}'


def test_large_files_of_runs_expire_and_nothing_else_that_is_current_does() -> None:
    rules = {rule["id"]: rule for rule in bucket("_lifecycle_configuration")["rule"]}
    expiring = {name: rule["filter"][0] for name, rule in rules.items() if "days" in rule.get("expiration", [{}])[0]}
    large = {"prefix": "${local.keys}runs/", "object_size_greater_than": 64 * 2**20}
    assert expiring == {"checkpoints": {"and": [large]}, "probes": {"prefix": "${local.keys}.check/"}}
    assert "noncurrent_version_expiration" in rules["overwritten-and-deleted"]  # else it costs for ever
    assert bucket("")["lifecycle"][0]["prevent_destroy"] is True


@pytest.mark.parametrize(
    ("role", "subjects"),
    [
        ("fineloop-pipeline", [f"{SYSTEM}pipeline"]),
        ("fineloop-evaluator", [f"{SYSTEM}evaluator"]),
        ("fineloop-trainer", [f"{SYSTEM}trainer", f"{SYSTEM}experiments"]),
    ],
)
def test_a_role_is_taken_by_its_service_accounts_of_one_namespace(role: str, subjects: list[str]) -> None:
    configuration = Configuration()
    configuration.symbols["each.value"] = configuration.filled(configuration.local("subjects")[role])
    conditions = [("StringEquals", f"{ISSUER}:sub", subjects), ("StringEquals", f"{ISSUER}:aud", ["sts.amazonaws.com"])]
    trust = Statement("Allow", ["sts:AssumeRoleWithWebIdentity"], [], conditions)
    assert configuration.document("service_account") == [trust]
    (before,) = re.findall(r'replace\(var\.oidc_provider_arn, "/(.*)/", ""\)', configuration.local("issuer"))
    assert re.sub(before.replace("\\\\", "\\"), "", configuration.symbols["var.oidc_provider_arn"]) == ISSUER


def test_each_role_has_its_own_trust_and_its_own_policy() -> None:
    trust = [f'service_account["fineloop-{each}"]' for each in ("trainer", "evaluator", "pipeline")] + ["people"]
    for name, who in zip(ROLES, trust, strict=True):
        policy = CONFIGURATION.named("resource", "aws_iam_role_policy", name)
        assert policy["role"] == f"${{aws_iam_role.{name}.id}}"
        assert policy["policy"] == f"${{data.aws_iam_policy_document.{name}.json}}"
        role = CONFIGURATION.named("resource", "aws_iam_role", name)
        assert role["assume_role_policy"] == f"${{data.aws_iam_policy_document.{who}.json}}"
    assert len(re.findall(r'resource "aws_iam_role" ', SOURCE)) == len(ROLES)  # the reaper reads no object
    (output,) = (block["role_arns"] for block in CONFIGURATION.blocks["output"] if "role_arns" in block)
    roles = {f"fineloop-{each}": each for each in ("pipeline", "evaluator", "trainer")}
    roles["fineloop-experiments"] = "trainer"
    assert output["value"] == {account: f"${{aws_iam_role.{role}.arn}}" for account, role in roles.items()}


ROLE, KEY = "arn:aws:iam::111122223333:role/on-call", "arn:aws:kms:eu-central-1:111122223333:key/0f-1"
PROVIDER = "arn:aws:iam::111122223333:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/0F"


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        # With its suffix, of at most nine characters, the bucket's name is that of a role, which has 64 at most.
        ("bucket", ["fineloop", "a-1", "a" * 55], ["Fineloop", "fine.loop", "-a1", "ab", "a" * 56]),
        ("prefix", ["", "team-a", "a/b.c/d_e"], ["/a", "a/", "a//b", "a b", "a*"]),
        ("oidc_provider_arn", [PROVIDER], [f"https://{PROVIDER}", "arn:aws:iam::111122223333:oidc-provider/*"]),
        ("namespace", ["fineloop", "a"], ["*", "fine*", "Fineloop", "", "a-"]),
        ("admin_principal_arns", [ROLE], ["*", "arn:aws:iam::111122223333:root", "arn:aws:iam::111122223333:role/*"]),
        ("source_arns", ["arn:aws:s3:::claims/2026/*"], ["*", "arn:aws:s3:::claims", "arn:aws:s3:::*/x"]),
        ("kms_key_arn", ["", KEY], ["alias/fineloop", KEY.replace("key", "alias"), "*"]),
    ],
)
def test_a_variable_takes_what_it_should_and_refuses_the_rest(name: str, good: list[str], bad: list[str]) -> None:
    block = next(block[name] for block in CONFIGURATION.blocks["variable"] if name in block)
    (pattern,) = re.findall(r'regex\("(.*?[^\\])"', block["validation"][0]["condition"])
    assert [value for value in good + bad if re.search(pattern.replace("\\\\", "\\"), value)] == good
