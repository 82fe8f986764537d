"""Every page that Fineloop writes, as a reader gets it: whole, of one night of the example's adapter."""

import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from components.records.steps import HarnessScores, TaskScore, TextLosses
from components.registry.versions import publish_version
from components.report.registry_page import write_pages
from components.report.report import Beside, build_preview, build_report, build_side_by_side
from components.report.run_files import RunFiles, Wrong
from components.shared.paired import Bounds
from components.store.store import Store
from pipelines.local.past_runs import Side, Turned
from tests.components.report import example_runs
from tests.components.report.example_runs import (
    CANDIDATE,
    CHAMPION,
    PROFILE,
    SAMPLES,
    bounded,
    metrics,
)

WRONG = 30
"""Answers: axe-core takes its time for each row."""
NOW = datetime(2026, 11, 24, 2, 6, tzinfo=UTC)
CLASSES = ("Neoplasms", "Injury", "Infections", "Skin", "Musculoskeletal", "Endocrine", "Symptoms", "Pregnancy")
ASKED = (
    "Fracture of femur NOS", "Shingles with meningitis", "Anorexia", "Melanoma in situ of scalp and neck", "Mpox",
    "Kwashiorkor", "Chronic gouty arthropathy", "Retained placenta without hemorrhage", "Carrier of diphtheria",
    "Cellulitis and acute lymphangitis of face", "Benign neoplasm of skin of lip", "Juvenile osteochondrosis of hip",
)  # fmt: skip


def reports() -> dict[str, str]:
    """A report with every section, and those of runs that ended early."""
    found = {
        "report": full_run(),
        "report-forgetful": example_runs.forgetful_run(),
        "report-failed": example_runs.failed_run(),
        "report-skipped": example_runs.skipped_run(),
    }
    return {name: build_report(run) for name, run in found.items()}


def full_run() -> RunFiles:
    """The promoted run with all that an evaluation may measure, its wrong answers and its classes."""
    run = example_runs.promoted_run()
    assert run.evaluation
    text = TextLosses(text_sha256="0", tokens=[100] * 64, nll={"base": [340.0] * 64, "candidate": [352.0] * 64})
    models = {
        role: model and model.model_copy(update={"metrics": {**model.metrics, "general_loss": text.loss(role)}})
        for role, model in run.evaluation.models.items()
    }
    passed = {"base": 0.75, "champion": 0.71, "candidate": 0.17}
    scores = {role: (TaskScore(task="json", metric="passes", value=share),) for role, share in passed.items()}
    wrong = wrong_answers(WRONG)
    counts = [
        [sum((each.reference, each.answer) == (one, other) for each in wrong) for other in CLASSES] for one in CLASSES
    ]
    for place, row in enumerate(counts):
        row[place] = 21 + 3 * place
    evaluation = run.evaluation.model_copy(
        update={
            "models": models,
            "general_text": text,
            "harness": HarnessScores(lm_eval="0.4.13", tasks=("json",), scores=scores),
            "confusion": {"labels": [*CLASSES], "counts": counts},
        }
    )
    started = example_runs.training(final=0.9)
    for each in started[:4]:  # as a training starts that knows nothing of its answers
        each["loss"] *= 4 - each["step"] * 0.6
    assert run.decision
    run = replace(run, decision=bounded(run.decision))
    return replace(run, evaluation=evaluation, wrong=wrong, metrics=started, note="the weekly data, at twice the rank")


def wrong_answers(number: int) -> list[Wrong]:
    drawn = random.Random(3)
    pairs = [drawn.sample(CLASSES, 2) for _ in range(number)]
    return [
        Wrong(f"icd-{place:04}", f"ICD-10 chapter: {ASKED[place % len(ASKED)]}", reference, answer)
        for place, (reference, answer) in enumerate(pairs)
    ]


def compared() -> str:
    """`fineloop compare` of two runs."""
    names = ("20261124-0200", "20261117-0200")
    sides = [
        Side(name, name, version, note, {}, 0.95, measured, pa.table({}), example_runs.training(steps, floor))
        for name, version, note, measured, steps, floor in (
            (names[0], CHAMPION, "as it was", metrics(0.951, 0.683, 0.712, 1.301), 125, 0.93),
            (names[1], CANDIDATE, "rank 32", metrics(0.912, 0.72, 0.743, 1.384), 250, 0.88),
        )
    ]
    turned = [
        Turned(f"icd-{place:04}", f"ICD-10 chapter: {asked}", reference, before, after, after == reference)
        for place, (asked, reference, before, after) in enumerate(
            (asked.partition(": ")[2], reference, champion, candidate)
            for asked, reference, _, champion, candidate in SAMPLES
            if (champion == reference) != (candidate == reference)
        )
    ]
    gains = {
        "loss": Bounds(0.039, 0.018, 0.060, 0.0128, 300, 300),
        "exact_match": Bounds(0.037, -0.004, 0.078, 0.025, 300, 300),
    }
    return build_side_by_side(
        sides,
        {"method.rank": ["16", "32"], "train.epochs": ["1", "2"], "data.source": ["s3://intake/2026-11-16.jsonl", "-"]},
        [Beside(names[1], 300, 0.95, gains, turned)],
        generated_at=NOW,
    )


def previewed() -> str:
    """`fineloop data FILE --html`."""
    pieces = [
        {"text": "<|im_start|>user\nICD-10 chapter: Mpox<|im_end|>\n<|im_start|>assistant\n", "trained": False},
        {"text": "Infections<|im_end|>", "trained": True},
    ]
    body = {
        "profile": PROFILE,
        "gate": {"lacking": ""},
        "refused": "",
        "base": "SmolLM2-135M-Instruct",
        "shown": [{"id": "icd-0001", "pieces": pieces}, {"id": "icd-0002", "pieces": pieces}],
        "unread_because": "",
    }
    lines = [
        "2,000 records to train on, 224 held out, of 2,246 rows.",
        "A run's gate sees a difference of 6.1 points of exact match, or more, in 224 records.",
    ]
    return build_preview(body, lines)


def registry(store: Store) -> dict[str, str]:
    """The index and the adapter's page of a registry with some nights behind it, and another adapter."""
    for number in range(6):
        example_runs.night(store, number, promotes=number % 3 == 0)
    files = {"adapter_model.safetensors": b"notes", "adapter_config.json": b"{}"}
    publish_version(store, "meeting-notes", files, lineage={"run_id": "notes"})
    for name in ("icd", "meeting-notes"):
        write_pages(store, name, generated_at="24 November 2026, 02:06 UTC")
    found = {info.key: store.get(info.key).decode() for info in store.list("pages/") if info.key.endswith(".html")}
    return {Path(key).stem: page.replace(store.uri(""), "s3://fineloop/") for key, page in found.items()}


def all_pages(store: Store) -> Iterator[tuple[str, str]]:
    """Each page's name and its HTML."""
    yield from reports().items()
    yield "compare", compared()
    yield "data", previewed()
    for name, page in registry(store).items():
        yield f"registry-{name}", page
