"""Two runs on a tiny base and a real Ray head: what the first records do not tell of the second, more of them do."""

import io

import pyarrow.parquet as pq
import pytest

from components.records import runs
from components.records.steps import Decision, Evaluation
from components.store.store import Store
from tests.e2e.conftest import Tiny, settings

pytestmark = [pytest.mark.e2e, pytest.mark.full]

FIRST, MOST = 30, 80


def test_where_the_first_records_do_not_tell_the_verdict_is_on_more_of_them(tiny: Tiny, store: Store) -> None:
    # Two seeds differ by more, from record to record, than so narrow a margin lets a hundred records see.
    few = {"data.eval_share": 0.5, "evaluate.records": FIRST, "evaluate.max_records": MOST}
    keys = {**few, "adapter.name": "drawn", "gate.worse_than_champion_by": 0.001, "train.max_steps": 30}
    first = tiny.home.does("run", *tiny.settings, *settings(keys))
    assert first.answer["promoted"], first.screen
    assert runs.read(store, first.answer["run_id"], Evaluation).records == FIRST  # there was no champion yet

    second = tiny.home.does("run", *tiny.settings, *settings(keys | {"train.seed": 1}))
    assert f"{FIRST} records do not tell: {MOST - FIRST} more are drawn" in second.screen
    run_id = second.answer["run_id"]
    evaluation, decision = runs.read(store, run_id, Evaluation), runs.read(store, run_id, Decision)
    assert evaluation.records == MOST < evaluation.held_out
    assert evaluation.paired["champion"].records == MOST
    table = pq.read_table(io.BytesIO(store.get(runs.run_key(run_id, runs.EVALUATION_RECORDS))))
    assert len(set(table["id"].to_pylist())) == MOST
    # The passages of general text were read once, with the first records.
    assert {len(nll) for nll in evaluation.general_text.nll.values()} == {len(evaluation.general_text.tokens)}
    compared = next(rule for rule in decision.rules if rule.name == "not_worse_than_champion")
    assert f"({MOST} of them)" in compared.text
    assert tiny.home.fineloop("replay", run_id).answer["same"] is True
