"""What the bucket is like, who may take a role, and what the variables refuse."""

import re

import pytest

from tests.infra.aws.terraform import AWS, Configuration, source

SOURCE = source()
CONFIGURATION = Configuration(SOURCE)


def rules() -> dict[str, dict[str, object]]:
    return {rule["id"]: rule for rule in CONFIGURATION.resource("aws_s3_bucket_lifecycle_configuration")["rule"]}


def test_nothing_of_the_bucket_is_public_and_access_control_lists_are_off() -> None:
    block = CONFIGURATION.resource("aws_s3_bucket_public_access_block")
    flags = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
    assert [block[flag] for flag in flags] == [True] * 4
    ownership = CONFIGURATION.resource("aws_s3_bucket_ownership_controls")["rule"][0]
    assert ownership["object_ownership"] == "BucketOwnerEnforced"


def test_every_object_is_encrypted_and_every_version_kept() -> None:
    rule = CONFIGURATION.resource("aws_s3_bucket_server_side_encryption_configuration")["rule"][0]
    default = rule["apply_server_side_encryption_by_default"][0]
    assert rule["bucket_key_enabled"] is True
    assert default["sse_algorithm"] == '${var.kms_key_arn != "" ? "aws:kms" : "AES256"}'
    assert default["kms_master_key_id"] == '${var.kms_key_arn != "" ? var.kms_key_arn : null}'
    versioning = CONFIGURATION.resource("aws_s3_bucket_versioning")["versioning_configuration"][0]
    assert versioning["status"] == "Enabled"
    assert CONFIGURATION.resource("aws_s3_bucket")["lifecycle"][0]["prevent_destroy"] is True


def test_all_that_is_configured_is_configured_for_the_one_bucket() -> None:
    kinds = {kind for block in CONFIGURATION.blocks["resource"] for kind in block if kind.startswith("aws_s3_bucket_")}
    assert len(kinds) == 6
    assert {CONFIGURATION.resource(kind)["bucket"] for kind in kinds} == {"${aws_s3_bucket.registry.id}"}


def test_large_files_of_runs_expire_and_nothing_else_that_is_current_does() -> None:
    expiring = {name for name, rule in rules().items() if "days" in rule.get("expiration", [{}])[0]}  # type: ignore[index]
    assert expiring == {"checkpoints", "probes"}
    checkpoints = rules()["checkpoints"]["filter"][0]["and"][0]  # type: ignore[index]
    assert CONFIGURATION.value(checkpoints["prefix"]) == "runs/"
    assert checkpoints["object_size_greater_than"] == 64 * 2**20
    assert CONFIGURATION.value(rules()["probes"]["filter"][0]["prefix"]) == ".check/"  # type: ignore[index]
    assert Configuration(SOURCE, "team-a").value(checkpoints["prefix"]) == "team-a/runs/"


def test_what_was_overwritten_and_uploads_that_were_given_up_do_not_cost_for_ever() -> None:
    assert "noncurrent_version_expiration" in rules()["overwritten-and-deleted"]
    unfinished = rules()["unfinished-uploads"]["abort_incomplete_multipart_upload"][0]  # type: ignore[index]
    assert unfinished["days_after_initiation"] == 3
    assert {rule["status"] for rule in rules().values()} == {"Enabled"}


@pytest.mark.parametrize(
    ("role", "accounts"),
    [("fineloop-pipeline", ["fineloop-pipeline"]), ("fineloop-trainer", ["fineloop-trainer", "fineloop-experiments"])],
)
def test_a_role_is_taken_by_its_service_accounts_of_one_namespace(role: str, accounts: list[str]) -> None:
    subjects = [CONFIGURATION.value(subject) for subject in CONFIGURATION.local("subjects")[role]]
    (trust,) = CONFIGURATION.document("service_account", **{"each.value": subjects})
    issuer = CONFIGURATION.symbols["local.issuer"]
    assert trust.actions == ("sts:AssumeRoleWithWebIdentity",)
    assert set(trust.conditions) == {
        ("StringEquals", f"{issuer}:sub", tuple(f"system:serviceaccount:fineloop:{account}" for account in accounts)),
        ("StringEquals", f"{issuer}:aud", ("sts.amazonaws.com",)),
    }


def test_each_role_has_its_own_trust_and_its_own_policy() -> None:
    for name in ("trainer", "pipeline", "admin"):
        policy = CONFIGURATION.resource("aws_iam_role_policy", name)
        assert policy["role"] == f"${{aws_iam_role.{name}.id}}"
        assert policy["policy"] == f"${{data.aws_iam_policy_document.{name}.json}}"
    trust = {
        name: CONFIGURATION.resource("aws_iam_role", name)["assume_role_policy"] for name in ("trainer", "pipeline")
    }
    assert trust == {
        name: f'${{data.aws_iam_policy_document.service_account["fineloop-{name}"].json}}' for name in trust
    }
    assert CONFIGURATION.resource("aws_iam_role", "admin")["assume_role_policy"] == (
        "${data.aws_iam_policy_document.people.json}"
    )
    roles = [name for block in CONFIGURATION.blocks["resource"] for name in block.get("aws_iam_role", {})]
    assert sorted(roles) == ["admin", "pipeline", "trainer"]  # the reaper reads no object


def test_the_issuer_is_the_providers_arn_without_what_comes_before_it() -> None:
    expression = re.search(r'replace\(var\.oidc_provider_arn, "/(.*)/", ""\)', CONFIGURATION.local("issuer"))
    assert expression
    arn = str(CONFIGURATION.symbols["var.oidc_provider_arn"])
    assert re.sub(expression[1].replace("\\\\", "\\"), "", arn) == CONFIGURATION.symbols["local.issuer"]


def test_the_outputs_are_what_the_manifests_want() -> None:
    assert CONFIGURATION.output("role_arns")["value"] == {
        "fineloop-pipeline": "${aws_iam_role.pipeline.arn}",
        "fineloop-trainer": "${aws_iam_role.trainer.arn}",
        "fineloop-experiments": "${aws_iam_role.trainer.arn}",
    }
    assert set(CONFIGURATION.output("environment")["value"]) == {"AWS_REGION", "AWS_DEFAULT_REGION", "FINELOOP_BUCKET"}


def test_every_variable_is_described_and_every_one_but_the_tags_is_checked() -> None:
    inputs = CONFIGURATION.inputs()
    assert [name for name, block in inputs.items() if not block.get("description")] == []
    assert {name for name, block in inputs.items() if not block.get("validation")} == {"tags"}


def test_the_longest_bucket_gives_role_names_that_iam_takes() -> None:
    longest = Configuration(SOURCE, variables={"var.bucket": "a" * 55})
    names = [
        longest.value(CONFIGURATION.resource("aws_iam_role", role)["name"]) for role in ("trainer", "pipeline", "admin")
    ]
    assert max(map(len, names)) == 64
    assert re.search(CONFIGURATION.inputs()["bucket"]["validation"][0]["condition"].split('"')[1], "a" * 55)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("bucket", ["fineloop", "a-1"], ["Fineloop", "fine.loop", "-a1", "ab", "a" * 56]),
        ("prefix", ["", "team-a", "a/b.c/d_e"], ["/a", "a/", "a//b", "a b", "a*"]),
        ("region", ["eu-central-1", "us-gov-west-1"], ["eu-central", "EU-CENTRAL-1", "eu-central-1a"]),
        (
            "oidc_provider_arn",
            ["arn:aws:iam::111122223333:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/0F"],
            ["https://oidc.eks.eu-central-1.amazonaws.com/id/0F", "arn:aws:iam::111122223333:oidc-provider/*"],
        ),
        ("namespace", ["fineloop", "a"], ["*", "fine*", "Fineloop", "", "a-"]),
        (
            "admin_principal_arns",
            ["arn:aws:iam::111122223333:role/on-call", "arn:aws-cn:iam::111122223333:user/ann"],
            ["*", "arn:aws:iam::111122223333:root", "arn:aws:iam::111122223333:role/*"],
        ),
        (
            "source_arns",
            ["arn:aws:s3:::claims/2026/*", "arn:aws:s3:::claims/*"],
            ["*", "arn:aws:s3:::claims", "arn:aws:s3:::*/x"],
        ),
        (
            "kms_key_arn",
            ["", "arn:aws:kms:eu-central-1:111122223333:key/0f-1"],
            ["alias/fineloop", "arn:aws:kms:eu-central-1:111122223333:alias/fineloop", "*"],
        ),
    ],
)
def test_a_variable_takes_what_it_should_and_refuses_the_rest(name: str, good: list[str], bad: list[str]) -> None:
    condition = CONFIGURATION.inputs()[name]["validation"][0]["condition"]
    found = re.search(r'regex\("(.*?[^\\])"', condition)
    assert found
    pattern = re.compile(found[1].replace("\\\\", "\\"))
    assert [value for value in good if not pattern.search(value)] == []
    assert [value for value in bad if pattern.search(value)] == []


def test_every_variable_is_in_the_readme_with_its_default() -> None:
    readme = (AWS / "README.md").read_text(encoding="utf-8")
    assert [name for name in CONFIGURATION.inputs() if f"`{name}`" not in readme] == []
    assert [name for block in CONFIGURATION.blocks["output"] for name in block if f"`{name}`" not in readme] == []
