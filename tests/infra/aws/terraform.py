"""What infra/aws says: its blocks, read by python-hcl2, and its policy documents with their templates filled in.

Only what these files use is understood. Anything else is an error, so that a policy that cannot be judged is no pass.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hcl2

AWS = Path(__file__).resolve().parents[3] / "infra" / "aws"
BUCKET_ARN = "arn:aws:s3:::fineloop"
ACCOUNT = "arn:aws:iam::111122223333"
_OPTIONS = hcl2.SerializationOptions(with_comments=False, explicit_blocks=False, strip_string_quotes=True)
_TEMPLATE = re.compile(r"\$\{([^{}]*)\}")


def source() -> str:
    """All files, as Terraform sees them: one configuration."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(AWS.glob("*.tf")))


@dataclass(frozen=True)
class Statement:
    """One statement of a policy document."""

    effect: str
    actions: tuple[str, ...]
    resources: tuple[str, ...]
    conditions: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    """Operator, key and values."""


@dataclass
class Configuration:
    """The blocks, and what stands for the values that only `terraform apply` knows."""

    text: str
    prefix: str = ""
    variables: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.blocks = hcl2.loads(self.text, serialization_options=_OPTIONS)
        keys = f"{self.prefix}/" if self.prefix else ""
        self.symbols = {
            "aws_s3_bucket.registry.arn": BUCKET_ARN,
            "aws_iam_role.admin.arn": f"{ACCOUNT}:role/fineloop-admin",
            "local.keys": keys,
            "local.issuer": "oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLE",
            "local.source_buckets": ["arn:aws:s3:::claims"],
            "var.namespace": "fineloop",
            "var.oidc_provider_arn": f"{ACCOUNT}:oidc-provider/oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLE",
            "var.admin_principal_arns": [f"{ACCOUNT}:role/on-call"],
            "var.source_arns": [],
            "var.kms_key_arn": "",
            **self.variables,
        }
        self.symbols["local.root"] = self.value(self.local("root"))

    def local(self, name: str) -> Any:
        return next(block[name] for block in self.blocks["locals"] if name in block)

    def resource(self, kind: str, name: str = "registry") -> dict[str, Any]:
        return _named(self.blocks["resource"], kind, name)

    def output(self, name: str) -> dict[str, Any]:
        return next(block[name] for block in self.blocks["output"] if name in block)

    def inputs(self) -> dict[str, dict[str, Any]]:
        """Every variable's block, by name."""
        return {name: block for blocks in self.blocks["variable"] for name, block in blocks.items()}

    def document(self, name: str, **symbols: Any) -> list[Statement]:
        """The statements of a policy document, with those that it takes over from others."""
        block = _named(self.blocks["data"], "aws_iam_policy_document", name)
        unknown = block.keys() - {"statement", "dynamic", "source_policy_documents", "for_each"}
        assert not unknown, f"{name} uses {unknown}, which this reader does not know"
        inherited = [
            statement
            for reference in block.get("source_policy_documents", [])
            for statement in self.document(
                re.fullmatch(r"\$\{data\.aws_iam_policy_document\.(\w+)\.json\}", reference)[1]
            )  # type: ignore[index]
        ]
        conditional = [
            dynamic["statement"]["content"][0]
            for dynamic in block.get("dynamic", [])
            if self.symbols[re.search(r"var\.\w+", dynamic["statement"]["for_each"])[0]]  # type: ignore[index]
        ]
        return inherited + [self._statement(found, symbols) for found in [*block.get("statement", []), *conditional]]

    def _statement(self, block: dict[str, Any], symbols: dict[str, Any]) -> Statement:
        unknown = block.keys() - {"sid", "effect", "actions", "resources", "principals", "condition"}
        assert not unknown, f"a statement uses {unknown}, which this reader does not know"
        return Statement(
            effect=block.get("effect", "Allow"),
            actions=self.values(block["actions"], symbols),
            resources=self.values(block.get("resources", []), symbols),
            conditions=tuple(
                (found["test"], self.value(found["variable"], symbols), self.values(found["values"], symbols))
                for found in block.get("condition", [])
            ),
        )

    def values(self, found: Any, symbols: dict[str, Any] | None = None) -> tuple[str, ...]:
        """A list, or a template that stands for one."""
        if isinstance(found, str):
            return tuple({**self.symbols, **(symbols or {})}[found.removeprefix("${").removesuffix("}")])
        return tuple(self.value(item, symbols or {}) for item in found)

    def value(self, text: str, symbols: dict[str, Any] | None = None) -> str:
        """A string with each `${...}` replaced by what it stands for."""
        known = {**self.symbols, **(symbols or {})}
        filled = _TEMPLATE.sub(lambda match: str(known[match[1]]), text)
        assert "${" not in filled, f"{text} holds an expression that this reader does not know"
        return filled


def _named(blocks: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    return next(block[kind][name] for block in blocks if name in block.get(kind, {}))
