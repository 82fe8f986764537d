"""Who may do what under infra/aws, by AWS's rules: a Deny anywhere wins, and without an Allow there is no access."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.infra.aws.terraform import ACCOUNT, Configuration, Statement

ROLES = ("trainer", "evaluator", "pipeline", "admin")
STRANGER = "stranger"
"""Another role of the account, to which somebody gave everything on S3."""
EVERYTHING = Statement("Allow", ["s3:*"], ["*"], [])


@dataclass(frozen=True)
class Request:
    """One action on one bucket or object, with the condition keys that it carries: over TLS unless it says no."""

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)


def put(resource: str, *, if_match: bool = False, if_none_match: bool = False, part: bool = False) -> Request:
    """A write; `part` is one of a large upload's requests before its completion, which take no condition."""
    headers = {"s3:if-match": if_match, "s3:if-none-match": if_none_match}
    context = {key: "*" for key, sent in headers.items() if sent}
    return Request("s3:PutObject", resource, {**context, "s3:ObjectCreationOperation": str(not part).lower()})


def allows(configuration: Configuration, principal: str, request: Request) -> bool:
    """Whether the principal's own policy and the bucket's let the request through."""
    own = [EVERYTHING] if principal == STRANGER else configuration.document(principal)
    always = {"aws:SecureTransport": "true", "aws:PrincipalArn": f"{ACCOUNT}:role/fineloop-{principal}"}
    context = {**always, **request.context}
    effects = [
        effect
        for effect, actions, resources, conditions in [*own, *configuration.document("bucket")]
        if _is_like(request.action.lower(), map(str.lower, actions))
        and _is_like(request.resource, resources)
        and all(_holds(operator, context.get(key), values) for operator, key, values in conditions)
    ]
    return "Allow" in effects and "Deny" not in effects


def _is_like(text: str, patterns: Iterable[str]) -> bool:
    """IAM's wildcards; unlike those of a shell, they match slashes too."""
    return any(re.fullmatch(re.escape(each).replace(r"\*", ".*").replace(r"\?", "."), text) for each in patterns)


def _holds(operator: str, found: str | None, values: list[str]) -> bool:
    if operator == "Null":
        return ("true" if found is None else "false") in values
    if operator == "ArnNotEquals":  # negated operators hold for an absent key too
        return found is None or not _is_like(found, values)
    assert operator in ("Bool", "StringEquals"), f"the condition operator {operator} is not known here"
    return found in values
