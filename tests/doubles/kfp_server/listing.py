"""Lists as the server gives them: filtered, sorted, and in pages."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tests.doubles.kfp_server.errors import invalid

DEFAULT_SIZE, MAX_SIZE = 20, 200
COMMON = {"name", "display_name", "created_at", "description"}
KEYS = {
    "experiments": {*COMMON, "experiment_id", "storage_state"},
    "pipelines": {*COMMON, "pipeline_id"},
    "pipeline_versions": {*COMMON, "pipeline_version_id"},
    "runs": {*COMMON, "run_id", "experiment_id", "state", "storage_state", "recurring_run_id", "finished_at"},
    "recurringRuns": {*COMMON, "recurring_run_id", "updated_at", "pipeline_id", "pipeline_version_id"},
}


def page(kind: str, items: Iterable[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """One page of those that pass `filter`, newest last unless `sort_by` says otherwise."""
    kept = [item for item in items if _passes(kind, item, query.get("filter", ""))]
    key, _, order = (query.get("sort_by") or "created_at").partition(" ")
    if key not in KEYS[kind]:
        raise invalid(f"Invalid sorting field: {key!r}")
    kept.sort(key=lambda item: str(item.get(key, "")), reverse=order == "desc")
    size = min(int(query.get("page_size") or DEFAULT_SIZE) or DEFAULT_SIZE, MAX_SIZE)
    start = int(query.get("page_token") or 0)
    body: dict[str, Any] = {kind: kept[start : start + size], "total_size": len(kept)}
    if start + size < len(kept):
        body["next_page_token"] = str(start + size)
    return body


def _passes(kind: str, item: Mapping[str, Any], text: str) -> bool:
    try:
        predicates = json.loads(text)["predicates"] if text else []
    except (ValueError, KeyError, TypeError) as exc:
        raise invalid(f"failed to parse filter {text!r}") from exc
    return all(_holds(kind, item, predicate) for predicate in predicates)


def _holds(kind: str, item: Mapping[str, Any], predicate: Mapping[str, Any]) -> bool:
    key, operation = predicate.get("key", ""), predicate.get("operation")
    if key not in KEYS[kind]:
        raise invalid(f"no support for filtering on unrecognized field {key!r}")
    value = str(item.get("display_name" if key == "name" else key, ""))
    if operation in ("EQUALS", 1):
        return value == predicate.get("stringValue", predicate.get("string_value"))
    if operation in ("IN", 8):
        return value in predicate.get("stringValues", predicate.get("string_values", {})).get("values", [])
    raise invalid(f"invalid predicate operation {operation!r}")
