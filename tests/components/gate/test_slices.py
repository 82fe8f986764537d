"""What the gate makes of kinds of records that go another way than all of them together."""

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from components.config.gate import GateConfig
from components.gate.comparisons import Evidence, parse_evidence
from components.records.steps import Decision
from tests.components.gate.evidenced import TOKENS, decide, evaluation, model, rule


def decided(gains: dict[str, np.ndarray], policy: GateConfig, kind: str = "label") -> Decision:
    """The decision on a candidate that gains this many nats per token over the champion in each slice."""
    of_records = np.concatenate(list(gains.values()))
    names = np.repeat(list(gains), [len(each) for each in gains.values()])
    losses = {"base": np.full(len(names), 9.0), "champion": np.ones(len(names)), "candidate": 1.0 - of_records}
    measured = evaluation(model("v2", loss=1.0 - of_records.mean()), model(loss=9.0), model("v1"))
    columns = {f"{role}_nll": TOKENS * values for role, values in losses.items()}
    columns |= {f"{role}_exact_match": np.ones(len(names)) for role in losses}
    records = Evidence(np.full(len(names), TOKENS), columns, slices={kind: names})
    return decide(measured.model_copy(update={"records": len(names)}), policy, records)


def around(mean: float, deviation: float, records: int, seed: int = 0) -> np.ndarray:
    return mean + deviation * np.random.default_rng(seed).standard_normal(records)


def test_one_bad_slice_holds_a_candidate_that_is_better_on_the_whole() -> None:
    gains = {"Eye": around(0.1, 0.1, 200), "Skin": around(0.1, 0.1, 60, 1), "Blood": around(-0.3, 0.1, 40, 2)}
    decision = decided(gains, GateConfig())
    assert decision.verdict == "hold"
    (reason,) = decision.reasons
    assert "is worse than production's by more than 0.05 in 1 of 3 slices" in reason
    assert "label 'Blood' (40 records, gain between \N{MINUS SIGN}0.3" in reason
    found = rule(decision, "slices").slices
    assert [(each.name, each.worse) for each in found] == [("Blood", True), ("Skin", False), ("Eye", False)]
    for without in (GateConfig(slices=[]), GateConfig(slices=["length"]), GateConfig(worse_than_best_by=0.4)):
        assert decided(gains, without).verdict == "promote"


def test_a_slice_of_too_few_records_is_not_judged_and_a_slice_of_all_is_none() -> None:
    gains = {"Eye": around(0.1, 0.1, 200), "Blood": around(-0.3, 0.1, 29, 2)}
    assert [each.name for each in rule(decided(gains, GateConfig()), "slices").slices] == ["Eye"]
    assert decided(gains, GateConfig(min_records=29)).verdict == "hold"
    whole = decided({"Eye": around(0.1, 0.1, 200)}, GateConfig())
    assert "slices" not in [each.name for each in whole.rules]


def test_records_of_one_group_are_one_in_a_slice_too() -> None:
    gains = {"Eye": around(0.1, 0.1, 200), "Blood": np.repeat(around(-0.3, 0.1, 20, 2), 3)}
    assert decided(gains, GateConfig()).verdict == "hold"
    names = np.repeat(["Eye", "Blood"], [200, 60])
    groups = np.concatenate([np.arange(200), 200 + np.repeat(np.arange(20), 3)])
    of_records = np.concatenate(list(gains.values()))
    found = Evidence(
        np.ones(260), {"candidate_nll": -of_records, "champion_nll": np.zeros(260)}, groups, {"label": names}
    )
    measured = evaluation(model("v2"), model(loss=9.0), model("v1"))
    judged = rule(decide(measured, GateConfig(better_than_base_by=-99.0), found), "slices")
    assert [each.name for each in judged.slices] == ["Eye"]


def test_more_slices_ask_for_more_of_each() -> None:
    spread = around(0.0, 1.0, 60)
    bad = -0.05 + 0.3 * ((spread - spread.mean()) / spread.std(ddof=1) - 2.9 / math.sqrt(60))
    few = {"bad": bad, "good": around(0.1, 0.1, 200)}
    many = {**few, **{f"other{index}": around(0.1, 0.1, 30, index) for index in range(60)}}
    assert 0.05 / 62 < stats.ttest_1samp(bad, -0.05, alternative="less").pvalue < 0.05 / 3
    assert [decided(gains, GateConfig()).verdict for gains in (few, many)] == ["hold", "promote"]


def test_what_an_evaluation_keeps_says_which_slice_a_record_belongs_to() -> None:
    references = ["Eye", "Skin", "Blood"] * 20
    columns = {
        "answer_tokens": [2] * 60,
        "reference": references,
        "prompt": ["x" * length for length in range(60)],
        "source": ["a/", "b/"] * 30,
    }

    def parsed(**changed: list[str]) -> Evidence:
        sink = io.BytesIO()
        pq.write_table(pa.table({**columns, **changed}), sink)
        return parse_evidence(sink.getvalue(), "it")

    found = parsed().slices
    assert found["label"].tolist() == references
    assert found["source"].tolist() == ["a/", "b/"] * 30
    assert sorted(np.unique(found["length"], return_counts=True)[1]) == [19, 20, 21]
    assert found["length"][0] == found["length"][10] == "up to 24 characters"
    assert "label" not in parsed(reference=[f"answer {row}" for row in range(60)]).slices


def test_a_number_that_is_missing_in_a_slice_stops_the_candidate() -> None:
    losses = np.ones(100)
    columns = {"candidate_nll": np.where(np.arange(100) == 3, math.nan, losses), "champion_nll": losses}
    found = Evidence(losses, columns, slices={"label": np.repeat(["Eye", "Blood"], 50)})
    judged = rule(decide(evaluation(model("v2"), model(loss=9.0), model("v1")), GateConfig(), found), "slices")
    assert not judged.passed
    assert "of single records is unknown" in judged.text


def test_a_decision_on_a_slice_without_a_bound_is_read_back() -> None:
    """If two models differ on one record of a slice, a resample may hold none that differs, and has no spread."""
    gains = {"Eye": around(0.1, 0.1, 200), "Skin": np.append(np.zeros(29), 0.5)}
    decision = decided(gains, GateConfig())
    read = Decision.from_json(decision.as_json(), "s3://bucket/decision.json")
    assert rule(read, "slices") == rule(decision, "slices")
    (skin,) = [each for each in rule(decision, "slices").slices if each.name == "Skin"]
    assert skin.upper is None
    assert "label 'Skin' (30 records, gain above \N{MINUS SIGN}0.003)" in rule(decision, "slices").text
