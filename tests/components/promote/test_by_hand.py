import pytest

from components.promote.by_hand import Request, as_markdown, carry_out, promote_by_hand
from components.registry import aliases, runs, versions
from components.registry.records import Evaluation, Measured
from components.registry.store import Store
from components.shared.errors import ObjectMissing, UserError


@pytest.fixture
def published(store: Store) -> list[str]:
    """Ids of three versions, oldest first, whose losses are 0.1, 0.2 and 0.3."""
    found = []
    for number in (1, 2, 3):
        files = {"adapter_model.safetensors": bytes([number]), "adapter_config.json": b"{}"}
        run_id = f"run-{number}"
        version = versions.publish_version(store, "sums", files, lineage={"run_id": run_id}).version
        measured = Measured(version=version, metrics={"loss": number / 10, "prompt_gain": None})
        runs.write(store, run_id, Evaluation(run_id=run_id, records=1, models={"candidate": measured}))
        found.append(version)
    return found


def request(action: str, version: str = "", **fields: str) -> Request:
    asked = {"reason": "", "person": "", "job_id": "job-1", **fields}
    return Request("sums", action, version, "production", **asked)


def holder(store: Store) -> str | None:
    pointer = aliases.read_alias(store, "sums", "production")
    return pointer.version if pointer else None


def test_the_newest_version_is_promoted_when_none_is_named(store: Store, published: list[str]) -> None:
    event = carry_out(store, request("promote", person="ada", reason="looks right"))
    assert holder(store) == published[-1]
    assert (event.kind, event.body["actor"], event.body["reason"]) == ("promoted", "ada", "looks right")


def test_rolling_back_takes_the_version_before_once_for_each_run(store: Store, published: list[str]) -> None:
    for version in published:
        carry_out(store, request("promote", version[:8]))
    carry_out(store, request("roll back"))
    carry_out(store, request("roll back"))  # the step is run again
    assert holder(store) == published[1]
    carry_out(store, request("roll back", job_id="job-2"))
    assert holder(store) == published[0]
    carry_out(store, request("roll back", published[2], job_id="job-3"))
    assert holder(store) == published[2]


def test_what_its_own_run_promoted_and_a_person_rolled_back_can_be_promoted_again(
    store: Store, published: list[str]
) -> None:
    aliases.promote(store, "sums", published[0], cause=aliases.Cause("run-1"))
    aliases.promote(store, "sums", published[1], cause=aliases.Cause("run-2"))
    carry_out(store, request("roll back"))
    promote_by_hand(store, f"sums@{published[1]}")
    assert holder(store) == published[1]
    carry_out(store, request("roll back", job_id="job-2"))
    carry_out(store, request("promote", published[1], job_id="job-3"))
    carry_out(store, request("promote", published[1], job_id="job-3"))  # the step is run again
    assert holder(store) == published[1]


def test_the_page_tells_both_versions_and_who_asked(store: Store, published: list[str]) -> None:
    carry_out(store, request("promote", published[0]))
    asked = request("promote", published[1], person="ada", reason="fewer errors")
    text = as_markdown(store, asked, carry_out(store, asked))
    assert text.startswith(f"# sums@production is now {published[1]}\n")
    assert f"It was {published[0]}. Promoted by ada: fewer errors." in text
    assert f"| | {published[0]} | {published[1]} |" in text
    assert "| loss | 0.100 | 0.200 |" in text
    assert "| prompt gain | - | - |" in text


def test_a_first_promotion_says_that_the_alias_was_empty(store: Store, published: list[str]) -> None:
    asked = request("promote", published[0])
    assert "It was empty. Promoted by Kubeflow UI." in as_markdown(store, asked, carry_out(store, asked))


def test_what_cannot_be_done_is_said(store: Store, published: list[str]) -> None:
    with pytest.raises(UserError, match="expected 'promote' or 'roll back'"):
        carry_out(store, request("demote"))
    with pytest.raises(ObjectMissing, match="promote a version first"):
        carry_out(store, request("roll back"))
    with pytest.raises(ObjectMissing):
        carry_out(store, request("promote", "vffff"))
    with pytest.raises(UserError, match="which has no version"):
        carry_out(store, Request("none", "promote", "", "production", "", "", "job-1"))
    assert holder(store) is None
