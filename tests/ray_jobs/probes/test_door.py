"""A probe that nobody here has heard of: one object and a row, and it is shared out, measured, recorded and limited."""

from dataclasses import dataclass, replace

from components.config import config_file
from components.gate.policy import decide
from components.records.steps import Evaluation
from components.shared.metrics import METRICS, Metric
from ray_jobs.base import base_model
from ray_jobs.evaluate import compared
from ray_jobs.probes.texts import in_order
from ray_jobs.scoring.measure import Findings, Outcome, Rows, Subject, measure_shard
from ray_jobs.text import chat_format
from tests.components.gate.evidenced import evidence
from tests.models.tiny_version import RECORDS, contenders, publish

PROMPTS = ("a", "bb", "ccc", "dddd", "eeeee")
LENGTHS = {"base": 3.0, "candidate": 7.0}


@dataclass(frozen=True)
class Loudness:
    """Says of each prompt how long it is, and who was asked."""

    prompts: tuple[str, ...] = PROMPTS

    def at(self, rows: Rows) -> "Loudness":
        return replace(self, prompts=tuple(self.prompts[row] for row in rows(len(self.prompts))))

    def held_together(self) -> "Loudness":
        return self

    def run(self, subject: Subject, findings: Findings) -> list[float] | None:
        assert not subject.model.training
        assert list(findings) == ["base"][: subject.role != "base"]
        return [LENGTHS[subject.role] * len(prompt) for prompt in self.prompts]

    def outcome(self, shares: list[Findings], chat: chat_format.ChatFormat) -> Outcome:
        said = {role: in_order([share[role] for share in shares], len(self.prompts)) for role in shares[0]}
        means = {role: {"loudness": sum(each) / len(each)} for role, each in said.items()}
        return Outcome(said, means, lines=["loudness"])


def test_a_probe_is_shared_out_recorded_and_limited_by_its_row_alone(config, store, tmp_path, monkeypatch) -> None:
    row = Metric(
        "loudness", "loudness", "how loud", lower_is_better=True, may_compare=False, on_request=True, probe="loud"
    )
    monkeypatch.setitem(METRICS, "loudness", row)
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}"]
    config = config_file.loads(config_file.dumps(config), place)
    models = contenders(config, publish(config, store, tmp_path, with_data=False))
    whole = Loudness()
    results = [
        measure_shard(
            models,
            RECORDS[worker::2],
            {"loud": whole.at(lambda count, worker=worker: range(worker, count, 2))},
            shard_index=worker,
        )
        for worker in range(2)
    ]
    chat = chat_format.load(base_model.resolve(config.model), config.model)
    outcome = whole.outcome([share["loud"] for result in results for share in result.shares], chat)
    assert outcome.record == {role: [length * n for n in range(1, 6)] for role, length in LENGTHS.items()}

    first = results[0]
    evaluation = compared(
        config, models, RECORDS[::2], [*first.tokens.values()], first.scores, {"loud": outcome}, run_id="r"
    )
    read = Evaluation.from_json(evaluation.as_json(), "here")
    assert read.metric("candidate", "loudness") == 21
    assert read.metric("base", "loudness") == 9
    assert read.metric("candidate", "general_loss") is None
    assert read.probes == {"loud": outcome.record}

    policy = config.gate.model_copy(update={"min_records": 2})
    for most, held in ((20.0, True), (22.0, False)):
        limits = [policy.limits[0].model_copy(update={"metric": "loudness", "min": None, "max": most})]
        decided = decide(read, evidence(read), policy.model_copy(update={"limits": limits}), config.adapter)
        (rule,) = [rule for rule in decided.rules if rule.metric == "loudness"]
        assert rule.passed is not held
