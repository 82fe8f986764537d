"""Who may do what under infra/aws, by AWS's rules: a Deny anywhere wins, and without an Allow there is no access."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.infra.aws.terraform import ACCOUNT, Configuration, Statement

ROLES = ("trainer", "pipeline", "admin")
STRANGER = "stranger"
"""Another role of the account, to which somebody gave everything on S3."""
EVERYTHING = Statement("Allow", ("s3:*",), ("*",))


@dataclass(frozen=True)
class Request:
    """One action on one bucket or object."""

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)
    """Condition keys that the request carries; over TLS unless it says otherwise."""


def put(resource: str, *, if_match: bool = False, if_none_match: bool = False, part: bool = False) -> Request:
    """A write; `part` is one of a large upload's requests before its completion, which take no condition."""
    headers = {"s3:if-match": if_match, "s3:if-none-match": if_none_match}
    context = {key: "*" for key, sent in headers.items() if sent}
    return Request("s3:PutObject", resource, {**context, "s3:ObjectCreationOperation": str(not part).lower()})


def allows(configuration: Configuration, principal: str, request: Request) -> bool:
    """Whether the principal's own policy and the bucket's let the request through."""
    own = [EVERYTHING] if principal == STRANGER else configuration.document(principal)
    context = {
        "aws:SecureTransport": "true",
        "aws:PrincipalArn": f"{ACCOUNT}:role/fineloop-{principal}",
        **request.context,
    }
    matching = [found for found in [*own, *configuration.document("bucket")] if _matches(found, request, context)]
    return any(found.effect == "Allow" for found in matching) and all(found.effect != "Deny" for found in matching)


def _matches(statement: Statement, request: Request, context: Mapping[str, str]) -> bool:
    return (
        any(_like(pattern.lower(), request.action.lower()) for pattern in statement.actions)
        and any(_like(pattern, request.resource) for pattern in statement.resources)
        and all(_holds(operator, key, values, context) for operator, key, values in statement.conditions)
    )


def _like(pattern: str, text: str) -> bool:
    """IAM's wildcards; unlike those of a shell, they match slashes too."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), text) is not None


def _holds(operator: str, key: str, values: tuple[str, ...], context: Mapping[str, str]) -> bool:
    found = context.get(key)
    if operator == "Null":
        return ("true" if found is None else "false") in values
    if operator == "ArnNotEquals":  # negated operators hold for an absent key too
        return found is None or not any(_like(value, found) for value in values)
    if operator in ("Bool", "StringEquals"):
        return found in values
    raise AssertionError(f"the condition operator {operator} is not known here")
