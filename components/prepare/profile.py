"""What a person wants to see of a dataset before trusting it: profile.json."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from components.prepare.dataset import FORMAT, Record
from components.prepare.intake import Intake
from components.prepare.split import Deduplicated, TrainEvalSplit

_TOP_ANSWERS = 20
_SAMPLES = 3
_MAX_SAMPLE_CHARS = 2000


def build_profile(
    intake: Intake, deduplicated: Deduplicated, split: TrainEvalSplit, *, used: Collection[str]
) -> dict[str, Any]:
    """Account for every row: rows read = rejected + dropped + the records of both splits. `used` are the columns that
    were read."""
    return {
        "format": FORMAT,
        "rows": {
            "read": intake.num_rows,
            "accepted": len(intake.accepted),
            "rejected": len(intake.rejects),
            "rejected_share": round(intake.rejected_share, 6),
        },
        "rejected": [
            {"reason": reason, "rows": count, "example": f"{example.source}:{example.line}"}
            for reason, count, example in intake.reasons()
        ],
        "personal": {"records": intake.with_personal, "found": dict(intake.personal.most_common())},
        "dropped": {
            "erased": intake.erased,
            "personal_data": intake.withheld,
            "duplicate": deduplicated.duplicates,
            "superseded_by_same_id": deduplicated.superseded,
            "prompt_in_eval": split.prompt_in_eval,
            "near_duplicate_of_eval": split.near_duplicate_of_eval,
            "before_window": split.before_window,
            "over_max_records": split.over_max_records,
        },
        "near_duplicates": {
            "left_out_share": round(split.near_share, 6),
            "most_are_near": [{"begins": words, "records": count} for words, count in split.near_clusters],
            "in_train": split.near_in_train,
        },
        "system_message": _shared_system_message([*split.train, *split.evaluation]),
        "shapes": dict(intake.shapes.most_common()),
        "columns": dict(intake.columns.most_common()),
        "extra_columns": {name: rows for name, rows in intake.columns.most_common() if name not in used},
        "replayed": split.replayed,
        "splits": {"train": _describe(split.train), "eval": _describe(split.evaluation)},
        "sources": [
            {"source": each.source.name, "bytes": each.source.size_bytes, "rows": each.rows, "rejected": each.rejected}
            for each in intake.sources
        ],
    }


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Nearest-rank percentiles of at least one length."""
    ordered = sorted(lengths)
    last = len(ordered) - 1
    return {f"p{percent}": ordered[round(percent / 100 * last)] for percent in (0, 10, 50, 90, 99, 100)}


def _describe(records: Sequence[Record]) -> dict[str, Any]:
    answers = Counter(record.answer_text for record in records)
    top = [
        {"answer": _cut(answer), "records": count, "share": round(count / len(records), 6)}
        for answer, count in answers.most_common(_TOP_ANSWERS)
    ]
    groups = {record.group for record in records}
    return {
        "records": len(records),
        "groups": len(groups) if groups != {""} else None,
        "prompt_chars": percentiles([sum(len(turn.content) for turn in record.prompt) for record in records]),
        "answer_chars": percentiles([len(record.answer_text) for record in records]),
        "distinct_answers": len(answers),
        "most_frequent_answers": top if len(answers) < len(records) else [],
        "samples": [
            {
                "id": record.id,
                "prompt": [{"role": turn.role, "content": _cut(turn.content)} for turn in record.prompt],
                "answer": _cut(record.answer_text),
            }
            for record in records[:_SAMPLES]
        ],
    }


def _shared_system_message(records: Sequence[Record]) -> str | None:
    """The system message that every record begins with, if one: whoever asks the adapter should send it too."""
    first = {record.prompt[0] for record in records}
    message = first.pop()
    return message.content if not first and message.role == "system" else None


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SAMPLE_CHARS else f"{text[:_MAX_SAMPLE_CHARS]}…"
