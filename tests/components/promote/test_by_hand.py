import pytest

from components.promote.promote import Person, approve, as_markdown, carry_out, promote_by_hand, roll_back_by_hand
from components.records import runs
from components.records.steps import Decision, Evaluation, Measured
from components.registry import aliases, event_log
from components.registry.event_log import Event, EventKind
from components.shared.errors import AliasConflict, IntegrityError, ObjectMissing, UserError
from components.store.store import Store
from pipelines.commands.adapters import move_shown
from tests.components.registry import adapters
from tests.components.registry.adapters import holder


@pytest.fixture
def published(store: Store) -> list[str]:
    """Ids of three versions, oldest first, whose losses are 0.1, 0.2 and 0.3."""
    ids = []
    for number in (1, 2, 3):
        run_id = f"run-{number}"
        ids.append(adapters.published(store, bytes([number]), run_id=run_id).version)
        measured = Measured(version=ids[-1], metrics={"loss": number / 10, "prompt_gain": None})
        runs.write(store, run_id, Evaluation(run_id=run_id, records=1, models={"candidate": measured}))
    return ids


NOBODY = Person()


def ask(store: Store, action: str, version: str = "", person: Person = NOBODY, run_id: str = "job-1") -> Event:
    """What somebody enters in the form."""
    return carry_out(store, "icd", action, person, alias="production", version=version, run_id=run_id)


def test_the_newest_version_is_promoted_when_none_is_named(store: Store, published: list[str]) -> None:
    event = ask(store, "promote", person=Person("ada", "looks right"))
    assert holder(store) == published[-1]
    assert (event.kind, event.body["actor"], event.body["reason"]) == ("promoted", "ada", "looks right")


def test_later_candidates_are_held_to_what_a_person_promotes_and_its_event_says_in_the_place_of_what(
    store: Store, published: list[str]
) -> None:
    first = promote_by_hand(store, f"icd@{published[0]}", Person())
    assert first.body["evidence"] == {"anchor": published[0]}
    by_run = aliases.Cause("run-2", evidence={"anchor": published[0]})
    aliases.promote(store, "icd", published[1], cause=by_run)
    last = promote_by_hand(store, f"icd@{published[2]}", Person("ada"))
    assert last.body["evidence"] == {"anchor": published[2], "anchor_before": published[0]}
    said = f"later candidates are held to {published[2]} as the best version so far, in the place of {published[0]}"
    assert move_shown("icd", last, {}, moved=True).text.splitlines()[1:] == [said]
    back = promote_by_hand(store, f"icd@{published[0]}", Person("ada"))
    assert back.body["evidence"] == {"anchor": published[0], "anchor_before": published[2]}


def test_rolling_back_takes_the_version_before_once_for_each_run(store: Store, published: list[str]) -> None:
    for version in published:
        ask(store, "promote", version[:8])
    ask(store, "roll back")
    ask(store, "roll back")  # the step is run again
    assert holder(store) == published[1]
    ask(store, "roll back", run_id="job-2")
    assert holder(store) == published[0]
    ask(store, "roll back", published[2], run_id="job-3")
    assert holder(store) == published[2]


def test_what_a_person_rolled_back_a_person_can_promote_again(store: Store, published: list[str]) -> None:
    aliases.promote(store, "icd", published[0], cause=aliases.Cause("run-1"))
    aliases.promote(store, "icd", published[1], cause=aliases.Cause("run-2"))
    ask(store, "roll back")
    promote_by_hand(store, f"icd@{published[1]}", Person())
    assert holder(store) == published[1]
    ask(store, "roll back", run_id="job-2")
    ask(store, "promote", published[1], run_id="job-3")
    ask(store, "promote", published[1], run_id="job-3")  # the step is run again
    assert holder(store) == published[1]


def test_the_page_tells_both_versions_and_who_asked(store: Store, published: list[str]) -> None:
    ask(store, "promote", published[0])
    person = Person("ada", "fewer errors")
    text = as_markdown(store, "icd", ask(store, "promote", published[1], person))
    assert text.startswith(f"# icd@production is now {published[1]}\n")
    assert f"It was {published[0]}. Promoted by ada: fewer errors." in text
    assert f"| | {published[0]} | {published[1]} |" in text
    assert "| loss | 0.100 | 0.200 |" in text
    assert "| prompt gain | - | - |" in text


def test_what_cannot_be_done_is_said(store: Store, published: list[str]) -> None:
    with pytest.raises(UserError, match="expected 'promote', 'approve' or 'roll back'"):
        ask(store, "demote")
    with pytest.raises(ObjectMissing, match="promote a version first"):
        ask(store, "roll back")
    with pytest.raises(ObjectMissing):
        ask(store, "promote", "vffff")
    with pytest.raises(UserError, match="which has no version"):
        carry_out(store, "none", "promote", Person(), alias="production", run_id="job-1")
    assert holder(store) is None


def proposed(store: Store, version: str, *, champion: str | None = None, alias: str = "production") -> Decision:
    """As the gate leaves a version to a person."""
    about = {"adapter": "icd", "alias": alias, "run_id": "run-9", "reasons": ("A person has to approve it.",)}
    compared = {"version": version, "champion": champion, "anchor": version, "test_set": ("a", "b")}
    decision = Decision(decision="hold", verdict="needs approval", **about, **compared)
    runs.write(store, "run-9", decision)
    body = {"version": version, "alias": alias, "run_id": "run-9", "decision_sha256": decision.sha256}
    event_log.append_event(store, "icd", "proposed", body)
    return decision


ADA = Person("ada", "read fifty answers")


def test_an_approval_carries_out_the_decision_and_names_the_person(store: Store, published: list[str]) -> None:
    decision = proposed(store, published[1])
    event = approve(store, f"icd@{published[1]}", ADA)
    assert holder(store) == published[1]
    assert (event.kind, event.body["actor"], event.body["reason"]) == ("promoted", "ada", "read fifty answers")
    assert event.body["run_id"] == "run-9"
    behind = {"decision": store.uri("runs/run-9/decision.json"), "sha256": decision.sha256}
    assert event.body["evidence"] == {**behind, "anchor": published[1], "test_set": ["a", "b"]}
    assert approve(store, f"icd@{published[1]}", ADA) == event


def test_an_approval_from_the_form_is_of_the_alias_that_waits_alone(store: Store, published: list[str]) -> None:
    proposed(store, published[2], alias="staging")
    for version in published:
        with pytest.raises(UserError, match=f"icd {version} does not wait for an approval to take production"):
            approve(store, f"icd@{version}", ADA)
    event = carry_out(store, "icd", "approve", ADA, alias="staging", run_id="job-1")
    assert (event.kind, event.body["actor"]) == ("promoted", "ada")
    assert (holder(store, "staging"), holder(store)) == (published[2], None)


@pytest.mark.parametrize("person", [Person("ada"), Person("", "why"), Person(" ", "why"), Person("", "", "root")])
def test_an_approval_takes_a_name_and_a_reason(store: Store, published: list[str], person: Person) -> None:
    proposed(store, published[1])
    with pytest.raises(UserError, match="say who answers for it and why"):
        approve(store, f"icd@{published[1]}", person)
    assert holder(store) is None


def test_an_approval_that_comes_too_late_is_a_conflict(store: Store, published: list[str]) -> None:
    promote_by_hand(store, f"icd@{published[0]}", Person())
    proposed(store, published[1], champion=published[0])
    promote_by_hand(store, f"icd@{published[2]}", Person())
    with pytest.raises(AliasConflict, match=f"held by {published[2]}"):
        approve(store, f"icd@{published[1]}", ADA)


def test_another_decision_than_the_gates_is_not_carried_out(store: Store, published: list[str]) -> None:
    decision = proposed(store, published[1])
    runs.write(store, "run-9", decision.model_copy(update={"alias": "staging"}))
    with pytest.raises(IntegrityError, match="it was changed since"):
        approve(store, f"icd@{published[1]}", ADA)
    assert holder(store) is None


@pytest.mark.parametrize(
    "changes",
    [{"version": "v0000000000000000"}, {"alias": "staging"}, {"adapter": "other"}, {"verdict": "hold"}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_proposal_that_names_a_decision_about_something_else_moves_nothing(
    store: Store, published: list[str], changes: dict[str, str]
) -> None:
    decision = proposed(store, published[0]).model_copy(update={"version": published[1], **changes})
    runs.write(store, "run-9", decision)
    body = {"version": published[1], "alias": "production", "run_id": "run-9", "decision_sha256": decision.sha256}
    event_log.append_event(store, "icd", "proposed", body)
    with pytest.raises(IntegrityError, match=f"leaves icd {published[1]} and production to a person, and that one is"):
        approve(store, f"icd@{published[1]}", ADA)
    assert aliases.list_aliases(store, "icd") == []


@pytest.mark.parametrize("kind", ["refused", "proposed"])
def test_overriding_a_gate_takes_a_name_and_a_reason(store: Store, published: list[str], kind: EventKind) -> None:
    body = {"version": published[1], "alias": "production", "run_id": "run-9"}
    event_log.append_event(store, "icd", kind, body)
    for person in (Person(), Person(otherwise="root", reason="why"), Person("ada")):
        with pytest.raises(UserError, match=f"the gate holds icd {published[1]}, and this overrides it: say who"):
            promote_by_hand(store, f"icd@{published[1]}", person)
        with pytest.raises(UserError, match="overrides it"):
            roll_back_by_hand(store, "icd", person, to=published[1])
    assert holder(store) is None
    event = promote_by_hand(store, f"icd@{published[1]}", ADA)
    assert (event.kind, event.body["actor"], event.body["reason"]) == ("overridden", "ada", "read fifty answers")
    assert promote_by_hand(store, f"icd@{published[1]}", Person(otherwise="root"), alias="staging").kind == "promoted"


def test_what_was_approved_once_is_no_override_later(store: Store, published: list[str]) -> None:
    promote_by_hand(store, f"icd@{published[0]}", Person())
    proposed(store, published[1], champion=published[0])
    approve(store, f"icd@{published[1]}", ADA)
    roll_back_by_hand(store, "icd", Person())
    assert holder(store) == published[0]
    assert promote_by_hand(store, f"icd@{published[1]}", Person()).kind == "promoted"
