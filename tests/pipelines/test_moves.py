"""Who moves an alias by `fineloop adapters`, and what it asks for: a name, a reason, and what waits for them."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.records import runs
from components.records.steps import Decision
from components.registry import aliases, event_log
from components.registry.cache import LISTED
from components.store.store import Store
from tests.pipelines.command_line import body, fineloop


def test_a_refused_version_promoted_by_hand_is_overridden(
    store: Store, published: list[str], config_path: Path, tmp_path: Path
) -> None:
    new = published[1]
    aliases.append_event(store, "sums", "refused", {"version": new, "alias": "production", "run_id": "r"})
    store.put_json(LISTED, {"sums": {"in_production": "the old one"}, "other": {"in_production": "its own"}})
    refused = fineloop("adapters", "promote", f"sums@{new}", "-c", config_path, cwd=tmp_path)
    assert refused.returncode == 2
    assert store.get_json(LISTED).keys() == {"sums", "other"}
    assert f"the gate holds sums {new}, and this overrides it: say who answers for it and why" in refused.stderr
    why = ("--by", "ada", "--reason", "the test set is wrong")
    assert fineloop("adapters", "promote", f"sums@{new}", *why, "-c", config_path, cwd=tmp_path).returncode == 0
    event = event_log.events(store, "sums")[-1]
    assert (event.kind, event.body["actor"], event.body["reason"]) == ("overridden", "ada", "the test set is wrong")
    assert store.get_json(LISTED).keys() == {"other"}  # the next run reads what is in production of sums


@pytest.mark.slow
def test_what_stands_in_staging_goes_to_production(
    store: Store, published: list[str], config_path: Path, tmp_path: Path
) -> None:
    old, new = published

    def adapters(*arguments: str) -> dict[str, Any]:
        return body(fineloop("adapters", *arguments, "-c", config_path, "--json", cwd=tmp_path))

    moved = adapters("promote", f"sums@{new}", "--alias", "staging")
    assert (moved["alias"], moved["from"], moved["to"]) == ("staging", None, new)
    assert [adapters("show", f"sums@{alias}")["version"] for alias in ("staging", "production")] == [new, old]
    assert adapters("promote", "sums@staging")["to"] == new
    assert adapters("show", f"sums@{new}")["aliases"] == ["production", "staging"]
    assert adapters("rollback", "sums")["to"] == old
    assert adapters("show", "sums@staging")["version"] == new


def test_what_the_gate_left_to_a_person_is_approved_by_name(
    store: Store, published: list[str], config_path: Path, tmp_path: Path
) -> None:
    old, new = published
    verdict = {"decision": "hold", "verdict": "needs approval", "reasons": ["A person has to approve it."]}
    about = {"version": new, "alias": "production", "run_id": "r9", "champion": old}
    decision = Decision.model_validate_json(json.dumps({**verdict, **about, "adapter": "sums"}))
    runs.write(store, "r9", decision)
    event_log.append_event(store, "sums", "proposed", {**about, **verdict, "decision_sha256": decision.sha256})
    asked = ("adapters", "approve", f"sums@{new}", "-c", config_path)

    unnamed = fineloop(*asked, "--reason", "read fifty answers", cwd=tmp_path)
    assert unnamed.returncode == 2
    assert "--by" in unnamed.stderr
    approved = fineloop(*asked, "--by", "ada", "--reason", "read fifty answers", "--json", cwd=tmp_path)
    assert approved.returncode == 0, approved.stderr
    assert (body(approved)["from"], body(approved)["to"]) == (old, new)
    history = fineloop("adapters", "history", "sums", "-c", config_path, cwd=tmp_path).stdout.splitlines()
    assert [line.split()[1] for line in history[-2:]] == ["proposed", "promoted"]
    assert "A person has to approve it." in history[-2]
    assert "by ada: read fifty answers" in history[-1]
    again = fineloop("adapters", "approve", f"sums@{old}", *asked[3:], "--by", "ada", "--reason", "x", cwd=tmp_path)
    assert again.returncode == 2
    assert "does not wait for an approval to take production" in again.stderr
