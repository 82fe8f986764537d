"""The lower parts of the page: sample answers, data, time, and origin."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from components.records.replayed import Replayed
from components.records.steps import ROLES
from components.report.comparison import names
from components.report.cost import cost
from components.report.numbers import count, moment, parse_moment
from components.report.run_files import RunFiles
from components.shared.answers import normal
from components.shared.durations import duration

MAX_TEXT_CHARS = 900
DRAWN = 100
"""Number of answers in the page's table. A browser takes seconds to lay out thousands of rows, so a script draws the
others when they are found or asked for."""
SHOWN_PACKAGES = ("fineloop", "accelerate", "bitsandbytes", "deepspeed", "kfp", "peft", "ray", "torch", "transformers")
"""The packages that the page shows, of all that lineage.json names."""
_MAX_ANSWERS = 10
_PERSONAL = {
    "email": "e-mail addresses",
    "phone": "phone numbers",
    "card": "card numbers",
    "iban": "IBANs",
    "secret": "keys and tokens",
    "name": "names",
}
_DROPPED = {
    "personal_data": "records with personal data",
    "duplicate": "exact duplicates",
    "superseded_by_same_id": "older rows with the same id",
    "prompt_in_eval": "training rows whose prompt is held out",
    "near_duplicate_of_eval": "training rows that hardly differ from a held-out prompt",
    "before_window": "training rows from before data.window_days",
    "over_max_records": "beyond data.max_records",
}


@dataclass(frozen=True)
class Answer:
    """What one model said to a prompt."""

    role: str
    name: str
    text: str
    right: bool


@dataclass(frozen=True)
class Sample:
    """One prompt with its reference and the models' answers."""

    prompt: tuple[tuple[str, str], ...]
    """(role, text) of each turn; the role is empty for a single user turn."""
    reference: str
    answers: tuple[Answer, ...]
    change: str
    """`newly right`, `newly wrong` or empty: the candidate against the champion, or the base if there is none."""


@dataclass(frozen=True)
class StepTime:
    """One step on the time line. `start` and `width` are in per cent of the whole run."""

    name: str
    status: str
    start: float
    width: float
    text: str


def samples(run: RunFiles) -> list[Sample]:
    """Return the evaluation's sample answers, right or wrong by exact match."""
    called = names(run)
    result = []
    for sample in run.evaluation.samples if run.evaluation else []:
        reference = str(sample["reference"])
        answers = tuple(
            Answer(role, called[role], clipped(str(sample[role])), _same(str(sample[role]), reference))
            for role in ROLES
            if sample.get(role) is not None
        )
        result.append(Sample(_turns(sample["prompt"]), clipped(reference), answers, _change(answers)))
    return result


def right_counts(shown: Sequence[Sample]) -> list[str]:
    """How many of the shown answers of each model are right, in words."""
    totals: dict[str, int] = {}
    for sample in shown:
        for answer in sample.answers:
            totals[answer.name] = totals.get(answer.name, 0) + answer.right
    return [f"{name} {right} of {len(shown)}" for name, right in totals.items()]


def wrong_answers(run: RunFiles) -> tuple[list[list[str]], str]:
    """Return the candidate's wrong answers: the rows that the page draws, and the others as JSON for a script."""
    texts = [
        [clipped(each.prompt), each.id, clipped(each.reference), clipped(each.answer) or "(empty answer)"]
        for each in run.wrong
    ]
    rest = texts[DRAWN:]
    return texts[:DRAWN], htmlsafe_json_dumps(rest, ensure_ascii=False, separators=(",", ":")) if rest else ""


def clipped(text: str) -> str:
    """Return the text, or its beginning and how much is missing."""
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return f"{text[:MAX_TEXT_CHARS]} … ({count(len(text) - MAX_TEXT_CHARS)} more characters)"


def data_profile(profile: Mapping[str, Any] | None, replayed: Replayed | None = None) -> dict[str, Any] | None:
    """Return counts, rejects, splits and answers of profile.json, ready to show, and whose answers were replayed if
    production was asked; None if there is no profile."""
    if profile is None:
        return None
    rows = profile.get("rows", {})
    splits = {name: profile.get("splits", {}).get(name, {}) for name in ("train", "eval")}
    num_records = sum(split.get("records", 0) for split in splits.values())
    top = splits["train"].get("most_frequent_answers", [])[:_MAX_ANSWERS]
    largest = max((answer["share"] for answer in top), default=1.0)
    return {
        "facts": [
            ("Rows read", count(rows.get("read"))),
            ("Training records", _in_groups(count(splits["train"].get("records")), splits["train"])),
            (
                "Held-out records",
                _in_groups(_with_share(splits["eval"].get("records", 0), num_records), splits["eval"]),
            ),
            ("Rejected rows", _with_share(rows.get("rejected", 0), rows.get("read", 0))),
            *([("Columns not read", ", ".join(extra))] if (extra := profile.get("extra_columns")) else []),
            *([("Earlier records replayed", _replayed(replayed))] if replayed else []),
        ],
        "rejected": [
            {"reason": each["reason"], "rows": count(each["rows"]), "example": each.get("example", "")}
            for each in profile.get("rejected", [])
        ],
        "dropped": [
            (_DROPPED.get(name, name.replace("_", " ")), count(rows))
            for name, rows in profile.get("dropped", {}).items()
            if rows
        ],
        "personal": [
            (_PERSONAL.get(kind, kind), count(found))
            for kind, found in profile.get("personal", {}).get("found", {}).items()
        ],
        "near": _near(profile.get("near_duplicates", {})),
        "lengths": [
            (f"{title}, {words}", _lengths(splits[name].get(key, {})))
            for key, title in (("prompt_chars", "Prompt"), ("answer_chars", "Answer"))
            for name, words in (("train", "training"), ("eval", "held out"))
            if splits[name].get(key)
        ],
        "answers": [
            {
                "answer": clipped(each["answer"]),
                "text": f"{each['share']:.1%}".replace("%", " %"),
                "width": max(each["share"] / largest * 100, 0.4),
            }
            for each in top
        ],
        "distinct_answers": count(splits["train"].get("distinct_answers")),
        "sources": [
            f"{each['source']}: {count(each.get('rows'))} rows, {count(each.get('rejected', 0))} rejected"
            for each in profile.get("sources", [])
        ],
    }


def _replayed(found: Replayed) -> str:
    if found.version is None:
        return f"{count(found.asked)} with their own answers: nothing was in production"
    if not found.kept:
        return f"{count(found.asked)} with their own answers: {found.version} answered none rightly"
    others = ", the others with their own" if found.kept < found.asked else ""
    return f"{count(found.kept)} of {count(found.asked)} with right answers of {found.version}{others}"


def _near(profile: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the prompts that near-duplicates of held-out prompts resemble, and the count of those within training."""
    near = [(f"near “{each['begins']} …”", count(each["records"])) for each in profile.get("most_are_near", [])]
    in_train = profile.get("in_train", 0)
    return near + (
        [("training records that hardly differ from another, and stay", count(in_train))] if in_train else []
    )


def step_times(run: RunFiles) -> list[StepTime]:
    """The steps on one time line, in the order they started."""
    known = [(start, step) for step in run.steps if (start := parse_moment(step.started_at))]
    if not known:
        return []
    known.sort(key=lambda each: each[0])
    begin = known[0][0]
    end = max(start + timedelta(seconds=step.seconds) for start, step in known)
    total = max((end - begin).total_seconds(), 1e-9)
    return [
        StepTime(
            step.step,
            step.status,
            start=(start - begin).total_seconds() / total * 100,
            width=max(step.seconds / total * 100, 0.4),
            text=duration(step.seconds),
        )
        for start, step in known
    ]


def run_facts(run: RunFiles) -> list[tuple[str, str]]:
    """The line of facts under the headline."""
    starts = [start for step in run.steps if (start := parse_moment(step.started_at))]
    seconds = sum(step.seconds for step in run.steps)
    facts = [("Adapter", run.adapter), ("Candidate", run.version or "none"), ("Run", run.run_id)]
    if run.note:
        facts.append(("Note", run.note))
    if run.evaluation and run.evaluation.fold:
        facts.append(("Judged by", f"fold {run.evaluation.fold} of {run.evaluation.folds} of what is held out"))
    if run.decision and (run.decision.look or 0) > 1:
        facts.append(("Decisions on these records", f"{run.decision.look}, this one included"))
    if starts:
        user = ((run.lineage or {}).get("started") or {}).get("user")
        facts.append(("Started", moment(min(starts)) + (f", by {user}" if user else "")))
    if seconds:
        facts.append(("Time", duration(seconds)))
    return facts


def costs(run: RunFiles) -> list[tuple[str, str]]:
    """What the training cost, and what a run took before its first step and its first comparison."""
    facts = []
    if cost_text := cost(run):
        facts.append(("Training cost", cost_text))
    if parts := run.until_first_step:
        parts_text = ", ".join(f"{each.part} {duration(each.seconds)}" for each in parts)
        facts.append(("First training step", f"after {duration(sum(each.seconds for each in parts))}: {parts_text}"))
    if run.until_compared_s is not None:
        facts.append(("First record compared", f"{duration(run.until_compared_s)} after training"))
    return facts


def origin(run: RunFiles) -> list[tuple[str, list[tuple[str, str]]]]:
    """Where the candidate comes from: groups of (name, value), from the evaluation and from lineage.json."""
    evaluation, lineage = run.evaluation, dict(run.lineage or {})
    champion = run.model("champion")
    base = {**(evaluation.base if evaluation else {}), **(lineage.pop("base", None) or {})}
    dataset = {"dataset_id": run.dataset_id, "uri": evaluation.dataset_uri if evaluation else None}
    dataset |= lineage.pop("dataset", None) or {}
    environment = dict(lineage.pop("environment", None) or {})
    packages = environment.pop("packages", None) or {}
    lineage.pop("config", None)  # shown whole below
    this_run = {
        "version": run.version,
        "previous version": champion.version if champion else None,
        "run_id": lineage.pop("run_id", run.run_id),
        "config_sha256": lineage.pop("config_sha256", run.config_digest),
        "parents": lineage.pop("parents", None),
    }
    groups = {
        "This run": this_run,
        "Code": environment.pop("code", None),
        "Dataset": dataset,
        "Base model": base,
        "Recipe": lineage.pop("recipe", None),
        "Training": lineage.pop("training", None),
        "Started": lineage.pop("started", None),
        "Hardware": lineage.pop("hardware", None),
        "Environment": {
            **environment,
            "packages": {name: packages[name] for name in SHOWN_PACKAGES if name in packages},
        },
        "Also recorded": {key: value for key, value in lineage.items() if key not in ("schema_version", "adapter")},
    }
    flat = [(title, list(_flat(value))) for title, value in groups.items()]
    return [(title, lines) for title, lines in flat if lines]


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested JSON as (path, text); lists of plain values stay on one line."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, (Mapping, list)) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{index}]")
    elif isinstance(value, list):
        if value:
            yield name, ", ".join(str(inner) for inner in value)
    elif value is not None and value != "":
        yield name, ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _turns(prompt: object) -> tuple[tuple[str, str], ...]:
    if isinstance(prompt, str):
        return (("", clipped(prompt)),)
    turns = [(str(turn["role"]), clipped(str(turn["content"]))) for turn in prompt if isinstance(turn, Mapping)]  # type: ignore[attr-defined]
    return (("", turns[0][1]),) if len(turns) == 1 and turns[0][0] == "user" else tuple(turns)


def _same(answer: str, reference: str) -> bool:
    return normal(answer) == normal(reference)


def _change(answers: Sequence[Answer]) -> str:
    right = {answer.role: answer.right for answer in answers}
    before = right.get("champion", right.get("base"))
    after = right.get("candidate")
    if before is None or after is None or before == after:
        return ""
    return "newly right" if after else "newly wrong"


def _with_share(part: int, whole: int) -> str:
    return f"{count(part)} ({part / whole:.1%})".replace("%", " %") if whole else count(part)


def _in_groups(counted: str, split: Mapping[str, Any]) -> str:
    return f"{counted} in {count(split['groups'])} groups" if split.get("groups") else counted


def _lengths(percentiles: Mapping[str, int]) -> list[str]:
    return [count(percentiles.get(key)) for key in ("p0", "p50", "p90", "p99", "p100")]
