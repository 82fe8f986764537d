"""A champion that was chosen on the records that its successors are judged by."""

from typing import Any

import numpy as np
import pytest

from components.config.gate import GateConfig
from components.gate.comparisons import Evidence, lead_of, luck_of
from components.gate.gate import replay, run_gate
from components.records import runs
from components.records.steps import Decision, Evaluation, Lead, Measured, RuleResult
from components.registry.event_log import append_event
from components.store.store import Store
from tests.components.gate.evaluated import config, evaluation, put
from tests.components.gate.evidenced import decide, rule

TAU, SIGMA = 0.01, 0.009
"""What trainings differ by truly, and what the records add to each."""


def decided(version: str, loss: float, base: float = 2.0, **changes: Any) -> Decision:
    """An earlier decision on these records."""
    about = {"metric": "loss", "candidate": loss, "other": base, **changes}
    compared = RuleResult(name="better_than_base", field="f", passed=True, text="", **about)
    of_run = {"adapter": "icd10", "alias": "production", "run_id": version, "version": version, "reasons": ()}
    return Decision(decision="hold", rules=(compared,), **of_run)


@pytest.mark.parametrize(("decisions", "at_least"), [(12, 0.7), (50, 0.85)])
def test_what_is_taken_for_luck_is_what_the_best_measured_better_than_it_is(decisions: int, at_least: float) -> None:
    """The mean over five hundred test sets, of which each candidate's true loss is known; of few, rather too little."""
    random = np.random.default_rng(0)
    said, true, measured = [], [], []
    for _ in range(500):
        truly = TAU * random.standard_normal(decisions)
        seen = truly + SIGMA * random.standard_normal(decisions)
        best = int(seen.argmin())
        lead = lead_of(f"v{best}", "loss", [decided(f"v{night}", 1 + loss) for night, loss in enumerate(seen)])
        said.append(luck_of(lead, SIGMA * np.sqrt(2)))
        true.append(truly[best] - seen[best])
        measured.append(-seen[best])
    assert np.mean(true) > 0.3 * np.mean(measured)
    assert at_least * np.mean(true) <= np.mean(said) <= 1.05 * np.mean(true)


def test_a_recipe_that_gets_better_every_night_is_no_luck_of_its_last_version() -> None:
    earlier = [decided(f"v{night}", 1.5 - 0.01 * night + 0.001 * (-1) ** night) for night in range(20)]
    lead = lead_of("v19", "loss", earlier)
    assert lead is not None
    assert luck_of(lead, 0.02) <= lead.gain < 0.0015


def test_the_base_is_what_records_that_were_refreshed_have_in_common() -> None:
    random = np.random.default_rng(0)
    harder, losses = random.normal(0, 0.2, 20), random.normal(1, 0.01, 20)
    same = [decided(f"v{night}", loss) for night, loss in enumerate(losses)]
    refreshed = [
        decided(f"v{night}", loss + add, 2.0 + add)
        for night, (loss, add) in enumerate(zip(losses, harder, strict=True))
    ]
    one, other = (lead_of("v3", "loss", each) for each in (same, refreshed))
    assert one is not None
    assert other is not None
    assert (other.gain, other.variance) == pytest.approx((one.gain, one.variance))


@pytest.mark.parametrize(
    ("champion", "nights", "metric"),
    [
        pytest.param("v3", 7, "loss", id="too few"),
        pytest.param("v99", 20, "loss", id="chosen elsewhere"),
        pytest.param("v9", 20, "exact_match", id="other metric"),
        pytest.param(None, 20, "loss", id="none"),
    ],
)
def test_without_the_decisions_that_chose_it_a_champion_is_as_measured(champion, nights: int, metric: str) -> None:
    earlier = [decided(f"v{night}", 1.0 + night % 3, metric=metric) for night in range(nights)]
    assert lead_of(champion, "loss", earlier) is None
    assert luck_of(None, 0.01) == luck_of(Lead(gain=-0.02, variance=0.0001, decisions=30), 0.01) == 0


def compared(margins: str = "absolute") -> tuple[Evaluation, Evidence, GateConfig]:
    """A candidate that is as far behind as the margin allows, give or take what 400 records do."""
    random, tokens = np.random.default_rng(0), np.full(400, 2.0)
    champion = 2 * random.uniform(1.9, 2.1, 400)
    nll = {"base": champion + 2, "champion": champion, "candidate": champion + 0.03 + 0.1 * random.standard_normal(400)}
    models = {
        role: Measured(
            version=None if role == "base" else role,
            metrics={"loss": of.sum() / 800, "answer_prompt_gain": 1.0, "exact_match": 0.5},
        )
        for role, of in nll.items()
    }
    columns = {f"{role}_nll": of for role, of in nll.items()}
    columns |= {f"{role}_exact_match": np.resize([0.0, 1.0], 400) for role in nll}
    columns["candidate_other_prompt_nll"] = nll["candidate"] + 1
    policy = GateConfig(margins=margins, worse_than_champion_by=0.015 if margins == "absolute" else 0.0075)
    return Evaluation(run_id="r", records=400, models=models), Evidence(tokens, columns), policy


@pytest.mark.parametrize("margins", ["absolute", "relative"])
def test_what_is_luck_of_the_lead_is_not_asked_of_the_candidate(margins: str) -> None:
    measured, records, policy = compared(margins)
    as_measured = rule(decide(measured, policy, records), "not_worse_than_champion")
    assert as_measured.undecided
    shrunk = decide(measured, policy, records, lead=Lead(gain=0.02, variance=1e-5, decisions=32))
    found = rule(shrunk, "not_worse_than_champion")
    assert found.passed
    assert found.luck is not None
    assert found.gain == as_measured.gain
    # Of 30 free: 28 / 30 of half the squared error, against the variance.
    error = float(np.std(records.columns["candidate_nll"] - records.columns["champion_nll"], ddof=1) / 2 / np.sqrt(400))
    of_metric = 1.0 if margins == "absolute" else 1 / measured.models["champion"].metrics["loss"]  # type: ignore[union-attr, operator]
    assert found.luck == pytest.approx(0.02 * 28 / 30 * error**2 / 2 / 1e-5 * of_metric, rel=0.02)
    assert found.line == pytest.approx(as_measured.line + found.luck / of_metric)
    assert "luck" in found.text


def test_a_gate_reads_the_lead_from_its_own_decisions_and_replays_with_it(store: Store) -> None:
    losses = [1.0, 0.9, 1.01, 1.0, 0.99, 1.02, 1.0, 0.98, 1.01, 1.0]
    for night, loss in enumerate(losses):
        runs.write(store, f"night-{night}", decided(f"v{night}", loss).model_copy(update={"run_id": f"night-{night}"}))
        about = {"alias": "production", "run_id": f"night-{night}", "version": f"v{night}", "champion": "v"}
        append_event(store, "icd10", "refused", {**about, "test_set": ["a"]})
    found = evaluation(0.99, test_set=["a"])
    put(store, found)
    decision = run_gate(config(), store, "run-1")
    nights = np.arange(10)
    slope, start = np.polyfit(nights, losses, 1)
    left = losses - start - slope * nights
    assert decision.lead is not None
    assert (decision.lead.gain, decision.lead.variance) == pytest.approx((-left[1], (left**2).sum() / 8))
    assert decision.lead.decisions == 10
    assert replay(store, "run-1").is_same
