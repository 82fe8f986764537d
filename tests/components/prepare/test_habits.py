"""How reviewers work, and what the gate makes of it: production is right on 70 of 100 answers, candidates on others.

The truth of every answer is known, so that a promotion of a worse candidate is an error of the whole way: what feedback
becomes, what is held out, and the decision. `data.feedback` holds what people chose; with an audit, labels of a draw.
"""

import io
import random
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.gate import GateConfig
from components.config.schema import AdapterConfig
from components.gate import policy
from components.gate.check import pairs_of
from components.gate.comparisons import Evidence, parse_evidence
from components.prepare.audit import draw, name_of_draw
from components.prepare.drawing import draw_audit
from components.prepare.prepare import preview
from components.prepare.sources import find_sources
from components.shared.errors import DataError
from components.shared.metrics import metric_of
from tests.components.gate.evidenced import evaluation, model
from tests.components.prepare.test_traces import request

TURNS, LABELS, NIGHTS = 4_000, 200, 40
QUALITY = 0.7
GATE = GateConfig(metric="exact_match", worse_than_champion_by=0.05, worse_on_general_text_by=None)


def said_of(habit: str, number: int, *, is_right: bool, rng: random.Random) -> dict[str, object] | None:
    """What the reviewer says of one answer; None where nothing."""
    row: dict[str, object] = {"response_id": f"r{number}", "rater": f"rater {number % 50}"}
    sees = rng.random() < 0.3
    edit = {**row, "edited": f"right {number}"}
    match habit:
        case "edits what is wrong":
            return edit if sees and not is_right else None
        case "edits what is wrong, approves the rest":
            return None if not sees else {**row, "score": 1} if is_right else edit
        case "rates only":
            return {**row, "score": int(is_right)} if sees else None
        case "edits some of what is wrong":
            return edit if not is_right and rng.random() < 0.2 else None
        case "edits style of right answers too":
            styled = {**row, "edited": f"right {number} indeed"}
            return edit if sees and not is_right else styled if sees and rng.random() < 0.2 else None
        case _:
            return {**row, "label": f"right {number}"} if rng.random() < 0.1 else None


HABITS = (
    "edits what is wrong",
    "edits what is wrong, approves the rest",
    "rates only",
    "edits some of what is wrong",
    "edits style of right answers too",
    "labels a random tenth",
)


@pytest.fixture
def log(write_rows: Callable[..., str]) -> tuple[str, dict[int, bool]]:
    rng = random.Random(11)
    is_right = {number: rng.random() < QUALITY for number in range(TURNS)}
    rows = [request(number, f"right {number}" if right else f"wrong {number}") for number, right in is_right.items()]
    return write_rows(rows, "log.jsonl"), is_right


def promoted(ids: list[int], is_right: dict[int, bool], quality: float) -> float:
    """Share of nights in which a candidate of this quality replaces production on these records. It agrees with
    production on most of them."""
    promotions = 0
    theirs = np.array([float(is_right[number]) for number in ids])
    for night in range(NIGHTS):
        rng = np.random.default_rng([night, round(100 * quality)])
        independent = rng.random(len(ids)) < quality
        keeps = theirs * (rng.random(len(ids)) < min(1.0, quality / QUALITY))
        ours = np.where(rng.random(len(ids)) < 0.6, keeps, independent)
        columns = {
            "base_exact_match": np.zeros(len(ids)),
            "candidate_exact_match": ours,
            "champion_exact_match": theirs,
        }
        measured = {
            "candidate": model("v2", exact_match=float(ours.mean())),
            "base": model(None, exact_match=0.0),
            "champion": model("v1", exact_match=float(theirs.mean())),
        }
        shown = evaluation(measured["candidate"], measured["base"], measured["champion"])
        decided = policy.decide(shown, Evidence(np.ones(len(ids)), columns), GATE, AdapterConfig(name="icd"))
        promotions += decided.decision == "promote"
    return promotions / NIGHTS


@pytest.mark.parametrize("habit", HABITS)
def test_no_habit_of_reviewers_chooses_what_judges(habit: str, log, write_rows, run_config) -> None:
    source, is_right = log
    rng = random.Random(habit)
    said = [row for n, right in is_right.items() if (row := said_of(habit, n, is_right=right, rng=rng))]
    options = {"eval_share": 0.3, "near_duplicates": 0.0, "max_rows_per_rater": 0}
    config = run_config(source, feedback=write_rows(said, "said.jsonl"), **options)
    with pytest.raises(DataError, match=r"nothing of the log may judge.*fineloop data audit"):
        preview(config, find_sources(source)).__enter__()
    audit = draw_audit(config, LABELS)
    labels = [
        {"response_id": record.id, "label": f"right {record.id[1:]}", "audit": audit.name} for record in audit.records
    ]
    assert audit.name == name_of_draw(draw([record.id for record in audit.records], LABELS))
    feedback = [config.data.feedback, write_rows(labels, "audit.jsonl")]
    config = config.model_copy(update={"data": config.data.model_copy(update={"feedback": feedback})})
    with preview(config, find_sources(source)) as (_, parts):
        held_out = list(parts.evaluation)
    assert len(held_out) == LABELS
    ids = [int(record.id[1:]) for record in held_out]
    assert abs(np.mean([is_right[number] for number in ids]) - QUALITY) < 0.1
    assert promoted(ids, is_right, 0.55) <= 0.1
    assert promoted(ids, is_right, 0.2) == 0
    assert promoted(ids, is_right, 0.95) > 0.9


def test_the_gate_cannot_tell_on_records_that_people_chose() -> None:
    ours, theirs = np.ones(400), np.zeros(400)
    columns = {"base_exact_match": np.zeros(400), "candidate_exact_match": ours, "champion_exact_match": theirs}
    shown = evaluation(model("v2", exact_match=1.0), model(None, exact_match=0.0), model("v1", exact_match=0.0))
    for unfit, decision in ((0, "promote"), (3, "hold")):
        evidence = Evidence(np.ones(400), columns, unfit=unfit)
        decided = policy.decide(shown, evidence, GATE, AdapterConfig(name="icd"))
        assert decided.decision == decision
    assert any("3 of 400 records are logged answers that people chose" in reason for reason in decided.reasons)


def test_what_an_evaluation_lists_says_which_records_people_chose() -> None:
    listed = {"answer_tokens": [1, 1, 1, 1], "candidate_nll": [0.5] * 4, "base_nll": [0.6] * 4, "id": [*"abcd"]}
    logged = {"origin": ["", "edited", "labelled", "own"], "drawn": ["", "", "audit", ""]}
    for columns, unfit in ((listed, 0), (listed | logged, 2), (listed | {"origin": logged["origin"]}, 3)):
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink)
        evidence = parse_evidence(sink.getvalue(), "s3://b/records")
        assert evidence.unfit == unfit
        if unfit:
            with pytest.raises(DataError, match=f"{unfit} records of a look are logged answers that people chose"):
                pairs_of([evidence], metric_of("loss"), "base", relative=False)
        else:
            assert pairs_of([evidence], metric_of("loss"), "base", relative=False).num_independent == 4
