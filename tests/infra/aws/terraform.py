"""What infra/aws says: its blocks, read by python-hcl2, and its policy documents with their templates filled in.

Only what these files use is understood. Anything else is an error, so that a policy that cannot be judged is no pass.
"""

import re
from functools import cache
from typing import Any, NamedTuple

import hcl2

from infra.checks.manifests import INFRA

SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((INFRA / "aws").glob("*.tf")))
"""All files, as Terraform sees them: one configuration."""
BUCKET_ARN = "arn:aws:s3:::fineloop"
ACCOUNT = "arn:aws:iam::111122223333"
_OPTIONS = hcl2.SerializationOptions(with_comments=False, explicit_blocks=False, strip_string_quotes=True)


@cache
def _blocks(text: str) -> Any:
    return hcl2.loads(text, serialization_options=_OPTIONS)


class Statement(NamedTuple):
    """One statement of a policy document, each of its conditions as operator, key and values."""

    effect: str
    actions: list[str]
    resources: list[str]
    conditions: list[tuple[Any, ...]]


class Configuration:
    """The blocks, and what stands for the values that only `terraform apply` knows."""

    def __init__(self, text: str = SOURCE, prefix: str = "", **variables: Any) -> None:
        self.blocks = _blocks(text)
        self.symbols = {
            "aws_s3_bucket.registry.arn": BUCKET_ARN,
            "aws_iam_role.admin.arn": f"{ACCOUNT}:role/fineloop-admin",
            "local.keys": f"{prefix}/" if prefix else "",
            "local.issuer": "oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLE",
            "local.source_buckets": ["arn:aws:s3:::claims"],
            "var.namespace": "fineloop",
            "var.oidc_provider_arn": f"{ACCOUNT}:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLE",
            "var.source_arns": [],
            "var.kms_key_arn": "",
            **{f"var.{name}": value for name, value in variables.items()},
        }
        self.symbols["local.root"] = self.filled(self.local("root"))

    def local(self, name: str) -> Any:
        return next(block[name] for block in self.blocks["locals"] if name in block)

    def named(self, block: str, kind: str, name: str) -> dict[str, Any]:
        """What stands in the block of a resource or a data source."""
        return next(each[kind][name] for each in self.blocks[block] if name in each.get(kind, {}))

    def document(self, name: str) -> list[Statement]:
        """The statements of a policy document, with those that it takes over from others."""
        block = self.named("data", "aws_iam_policy_document", name)
        known = {"statement", "dynamic", "source_policy_documents", "for_each"}
        assert block.keys() <= known, f"unknown part of {name}"
        statements = list(block.get("statement", []))
        for dynamic in (found["statement"] for found in block.get("dynamic", [])):
            (variable,) = re.findall(r"var\.\w+", dynamic["for_each"])
            statements += dynamic["content"] if self.symbols[variable] else []
        inherited = re.findall(r"aws_iam_policy_document\.(\w+)\.json", str(block.get("source_policy_documents")))
        return [each for other in inherited for each in self.document(other)] + [*map(self._statement, statements)]

    def _statement(self, block: dict[str, Any]) -> Statement:
        known = {"sid", "effect", "actions", "resources", "principals", "condition"}
        assert block.keys() <= known, f"unknown part of {block}"
        return Statement(
            block.get("effect", "Allow"),
            self.filled(block["actions"]),
            self.filled(block.get("resources", [])),
            [
                (each["test"], self.filled(each["variable"]), self.filled(each["values"]))
                for each in block.get("condition", [])
            ],
        )

    def filled(self, found: Any) -> Any:
        """A string, or each of a list, with every `${...}` replaced by what it stands for, which may be a list."""
        if isinstance(found, list):
            return [self.filled(item) for item in found]
        whole = re.fullmatch(r"\$\{([^{}]*)\}", found)
        return self.symbols[whole[1]] if whole else re.sub(r"\$\{([^{}]*)\}", lambda name: self.symbols[name[1]], found)
