"""What every rule lets pass may still be a person's to decide."""

from typing import Any

import pytest

from components.config.gate import ApprovalConfig, GateConfig
from components.records.steps import Decision
from tests.components.gate.evidenced import decide, evaluation, model, rule


def decided(changed: float | None = 0.1, *, loss: float = 0.9, **approval: Any) -> Decision:
    champion = None if changed is None else model("v1")
    measured = evaluation(model("v2", loss=loss), model(loss=9.0), champion)
    policy = GateConfig(approval=ApprovalConfig(**approval))
    return decide(measured.model_copy(update={"changed_answers": changed}), policy)


def test_an_adapter_may_ask_for_every_version() -> None:
    assert decided().verdict == "promote"
    decision = decided(always=True)
    assert (decision.verdict, decision.decision, decision.waits) == ("needs approval", "hold", True)
    assert decision.reasons == ("A person has to approve every version of this adapter.",)
    assert rule(decision, "approval").field == "gate.approval.always"


@pytest.mark.parametrize(
    ("changed", "verdict"), [(0.3, "promote"), (0.301, "needs approval"), (None, "needs approval")]
)
def test_the_size_of_the_change_may_ask(changed: float | None, verdict: str) -> None:
    decision = decided(changed, changed_answers_above=0.3)
    assert decision.verdict == verdict
    found = rule(decision, "approval")
    reason = "points to no version yet" if changed is None else f"{changed * 100:.1f} % of the answers are other ones"
    assert reason in found.text
    assert found.bound_text == "at most 30 % changed"


def test_what_a_rule_holds_no_person_is_asked_about() -> None:
    decision = decided(loss=1.5, always=True)
    assert (decision.verdict, decision.waits) == ("hold", False)
    assert len(decision.reasons) == 1


def test_how_much_changed_is_part_of_what_the_verdict_follows_from() -> None:
    assert decided(0.1).basis_sha256 != decided(0.2).basis_sha256
