"""The profile of a dataset, for a person to check before trusting it: profile.json."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from components.prepare.dataset import FORMAT
from components.prepare.intake import Intake
from components.prepare.parts import Part
from components.prepare.split import Deduplicated, TrainEvalSplit
from components.prepare.workspace import Workspace, quoted
from components.shared.metrics import are_labels

_TOP_ANSWERS = 20
_SAMPLES = 3
_MAX_SAMPLE_CHARS = 2000


def build_profile(work: Workspace, intake: Intake, deduplicated: Deduplicated, split: TrainEvalSplit) -> dict[str, Any]:
    """Build the profile, which accounts for every row: rows read = rejected + dropped + the records of both splits."""
    return {
        "format": FORMAT,
        "rows": {
            "read": intake.num_rows,
            "accepted": intake.accepted,
            "rejected": intake.rejected,
            "rejected_share": round(intake.rejected_share, 6),
        },
        "rejected": [
            {"reason": reason, "rows": count, "example": f"{example.source}:{example.line}"}
            for reason, count, example in intake.reasons.most_common()
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
        "system_message": _shared_system_message(work, split),
        "shapes": dict(intake.shapes.most_common()),
        "columns": dict(intake.columns.most_common()),
        "extra_columns": dict(intake.unread.most_common()),
        "replayed": split.replayed,
        "never_trained": never_trained(work, split),
        "splits": {each.name: _describe(work, each) for each in split.parts.splits},
        "sources": [
            {"source": each.source.name, "bytes": each.source.size_bytes, "rows": each.rows, "rejected": each.rejected}
            for each in intake.sources
        ],
    }


def never_trained(work: Workspace, split: TrainEvalSplit) -> dict[str, int]:
    """The number of held-out records of each label that no record to train on has; empty if answers are not labels."""
    (distinct, records) = work.row(
        f"SELECT count(DISTINCT answer), count(*) FROM {_read(split.train, split.evaluation)}"
    )
    if not are_labels(distinct, records):
        return {}
    return dict(
        work.rows(
            f"SELECT answer, count(*) FROM {_read(split.evaluation)} WHERE answer NOT IN"
            f" (SELECT answer FROM {_read(split.train)}) GROUP BY answer ORDER BY 2 DESC, 1"
        )
    )


def percentiles(lengths: Iterable[int]) -> dict[str, int]:
    """Nearest-rank percentiles of at least one length."""
    return _of_counts(Counter(lengths))


def _of_counts(counts: Mapping[int, int]) -> dict[str, int]:
    last = sum(counts.values()) - 1
    found, seen, lengths = {}, 0, iter(sorted(counts))
    length = next(lengths)
    for percent in (0, 10, 50, 90, 99, 100):
        while seen + counts[length] <= round(percent / 100 * last):
            seen += counts[length]
            length = next(lengths)
        found[f"p{percent}"] = length
    return found


def _describe(work: Workspace, part: Part) -> dict[str, Any]:
    records, answer = _read(part), "answer"
    if "calls" in work.columns:
        answer = "CASE WHEN answer = '' THEN calls ELSE answer END"
    counted = f"SELECT {answer} AS answer, count(*) AS records, min(file_index * 2**32 + file_row_number) AS first"
    work.run(f"CREATE OR REPLACE TEMP TABLE answers AS {counted} FROM {records} GROUP BY 1")
    (distinct,) = work.row("SELECT count(*) FROM answers")
    top = work.rows(f"SELECT answer, records FROM answers ORDER BY records DESC, first LIMIT {_TOP_ANSWERS}")
    groups = work.row(f'SELECT count(DISTINCT "group") FROM {records}')[0] if "group" in work.columns else None

    def lengths(text: str) -> dict[str, int]:
        return _of_counts(dict(work.rows(f"SELECT {text} AS length, count(*) FROM {records} GROUP BY 1")))

    return {
        "records": len(part),
        "groups": groups,
        "prompt_chars": lengths("list_sum([length(turn.content) for turn in prompt])"),
        "answer_chars": lengths(f"length({answer})"),
        "distinct_answers": distinct,
        "most_frequent_answers": [
            {"answer": _cut(text), "records": count, "share": round(count / len(part), 6)} for text, count in top
        ]
        if distinct < len(part)
        else [],
        "samples": [
            {
                "id": record.id,
                "prompt": [{"role": turn.role, "content": _cut(turn.content)} for turn in record.prompt],
                "answer": _cut(record.answer_text),
            }
            for record in part.head(_SAMPLES)
        ],
    }


def _shared_system_message(work: Workspace, split: TrainEvalSplit) -> str | None:
    """The system message that every record begins with, if one: whoever asks the adapter should send it too."""
    first = f"SELECT DISTINCT prompt[1] FROM {_read(split.train, split.evaluation)} LIMIT 2"
    (message,), *others = work.rows(first)
    return message["content"] if not others and message["role"] == "system" else None


def _read(*parts: Part) -> str:
    """The SQL expression that reads the records of these parts."""
    paths = ", ".join(quoted(path) for part in parts for path in part.paths)
    return f"read_parquet([{paths}], file_row_number = true)"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SAMPLE_CHARS else f"{text[:_MAX_SAMPLE_CHARS]}…"
