"""What people said of logged answers: the rows of `data.feedback`, and what a logged answer becomes by them."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from components.config.train import DataConfig
from components.prepare.dataset import Origin
from components.prepare.sources import Source, find_sources, rows_of
from components.prepare.traces import fields_of, first_of, hash_of, name_of
from components.registry.between_runs import NONE_ERASED, Erased
from components.registry.identity import ID_DIGITS
from components.shared.errors import DataError

Use = Literal["good", "corrected", "rated_bad", "raters_disagree", "unrated"]
"""What becomes of a logged answer."""
LEARNED: tuple[Use, ...] = ("good", "corrected")
Kind = Literal["rating", "edited", "label", "outcome"]
_KINDS: tuple[Kind, ...] = ("rating", "edited", "label", "outcome")
"""From the weakest: what turned out counts above what somebody says is right, and that above what somebody likes."""
_GOOD = {"good", "pass", "passed", "correct", "relevant", "true", "yes", "up", "thumbs_up", "positive"}
_BAD = {"bad", "fail", "failed", "incorrect", "not_relevant", "false", "no", "down", "thumbs_down", "negative"}
# Beside their own names, those of OpenTelemetry's event gen_ai.evaluation.result and of Langfuse's scores.
_RESPONSE = ("response_id", "gen_ai.response.id", "observation_id", "observationId")
_RATER = ("rater", "user.id", "enduser.id", "author_user_id", "authorUserId")
_CRITERION = ("gen_ai.evaluation.name", "name")
_TIME = ("time", "timestamp", "timeUnixNano", "created_at")
_SCORE = ("score", "gen_ai.evaluation.score.value", "value")
_WORD = ("gen_ai.evaluation.score.label", "string_value", "stringValue")
_VERSION = re.compile(rf"(?:^|[@:/])(v[0-9a-f]{{{ID_DIGITS}}})$")
"""The version in NAME@VERSION (the resolver for vLLM), BASE:VERSION (Ray Serve LLM) and VERSION (vLLM)."""
Key = tuple[str, str]
"""The name of the customer's own key, or an empty text for the response's id, and its value."""


class Vote(NamedTuple):
    """One row of feedback."""

    key: Key
    kind: Kind
    value: Any
    """Whether a rating is good; else the right answer: a text, or a message."""
    rater: str
    """A hash; empty where nobody is named."""
    criterion: str
    time: float
    """In seconds; minus infinity where the row has none."""


class Verdict(NamedTuple):
    """What all feedback on one answer comes to."""

    kind: Kind | None
    """None where no more than half of the raters agree."""
    value: Any
    rater: str
    differ: bool
    """Whether raters contradict each other."""


class Feedback(NamedTuple):
    """All feedback, and what became of its rows."""

    verdicts: Mapping[Key, Verdict] = {}
    rows: int = 0
    unusable: Mapping[str, int] = {}
    """Rows by the reason for which they were not read."""


@contextmanager
def _as_feedback() -> Iterator[None]:
    try:
        yield
    except DataError as exc:
        raise DataError(str(exc).replace("data.source", "data.feedback")) from exc


@_as_feedback()
def sources_of_feedback(data: DataConfig) -> list[Source]:
    """The files that data.feedback names; raises as `find_sources`."""
    return find_sources(data.feedback) if data.feedback else []


@_as_feedback()
def read_feedback(data: DataConfig, erased: Erased = NONE_ERASED) -> Feedback:
    """Read the feedback. Of one rater's rows on one answer the last counts, by their time, else by their order. Raises
    DataError: a source cannot be read, or more than data.max_reject_share of the rows say nothing; StoreError: an s3://
    source cannot be read."""
    last: dict[Key, dict[tuple[str, str], Vote]] = {}
    unusable: Counter[str] = Counter()
    rows = 0
    for _, batch in rows_of(sources_of_feedback(data)):
        rows += len(batch.rows)
        for row in batch.rows:
            try:
                vote = vote_of(row.value, key=data.feedback_key, least=data.feedback_good)
            except DataError as exc:
                unusable[str(exc)] += 1
                continue
            votes = last.setdefault(vote.key, {}) if vote.rater not in erased else {}
            before = votes.get((vote.rater, vote.criterion))
            if before is None or vote.time >= before.time:
                votes[vote.rater, vote.criterion] = vote
    if (bad := unusable.total()) > data.max_reject_share * rows:
        reasons = "".join(f"\n  {count:,} x {reason}" for reason, count in unusable.most_common(3))
        raise DataError(
            f"{bad:,} of {rows:,} rows of data.feedback are unusable, more than data.max_reject_share = "
            f"{data.max_reject_share:g} allows:{reasons}"
        )
    return Feedback({key: resolved(votes.values()) for key, votes in last.items()}, rows, unusable)


def vote_of(row: object, *, key: str, least: float | None) -> Vote:
    """The feedback that a row holds; `key` is data.feedback_key, and `least` data.feedback_good. Raises DataError: it
    names no answer, or says nothing of it that can be read."""
    if not isinstance(row, dict):
        raise DataError(getattr(row, "reason", "it is no object"))
    fields = fields_of(row)
    own, response, criterion = (name_of(first_of(fields, *paths)) for paths in ((key,), _RESPONSE, _CRITERION))
    if not own and not response:
        raise DataError(f"it names no answer: expected response_id{f' or {key}' if key else ''}")
    kind: Kind = next((kind for kind in _KINDS[:0:-1] if fields.get(kind) not in (None, "")), "rating")
    value: Any = row.get(kind, fields.get(kind))
    if kind == "rating":
        value = _is_good(first_of(fields, *_SCORE), first_of(fields, *_WORD), least)
    elif not isinstance(value, Mapping):  # an answer may be a text of JSON
        value = str(value).strip()
    rater, time = hash_of(first_of(fields, *_RATER)), _seconds(first_of(fields, *_TIME))
    return Vote((key, own) if own else ("", response), kind, value, rater, criterion, time)


def _is_good(score: Any, word: Any, least: float | None) -> bool:
    word = re.sub(r"[ -]", "_", str(word).strip().lower())
    if word in _GOOD | _BAD:
        return word in _GOOD
    try:
        number = float({"true": 1, "false": 0}.get(str(score).lower(), score))
    except (TypeError, ValueError, OverflowError):
        raise DataError("it has no score, label, edited or outcome that can be read") from None
    if least is None and not -1 <= number <= 1:
        raise DataError(f"its score is {number:g}, beyond -1 to 1: set data.feedback_good to the least good score")
    return number >= least if least is not None else number > 0.5


def _seconds(time: Any) -> float:
    """A moment in seconds since 1970: of ISO 8601, in UTC where it names no zone, or of a number in s, ms, us or ns."""
    if time is None:
        return -math.inf
    try:
        number = float(time)
        return number / 1000 ** max(0, int(math.log10(max(abs(number), 1)) - 8) // 3)
    except (TypeError, ValueError, OverflowError):
        pass
    try:
        moment = time if isinstance(time, datetime) else datetime.fromisoformat(str(time))
    except ValueError as exc:
        raise DataError(f"its time is {str(time)[:40]!r}: expected ISO 8601 or a number of seconds") from exc
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def resolved(votes: Iterable[Vote]) -> Verdict:
    """What the last vote of each rater comes to: the strongest kind counts, and of it what more than half say."""
    votes = list(votes)
    kind = max((vote.kind for vote in votes), key=_KINDS.index)
    by_value: dict[str, list[Vote]] = {}
    for vote in votes:
        if vote.kind == kind:
            by_value.setdefault(json.dumps(vote.value, sort_keys=True, default=str), []).append(vote)
    agreed = max(by_value.values(), key=len)
    if 2 * len(agreed) <= sum(map(len, by_value.values())):
        return Verdict(None, None, "", differ=True)
    last = max(agreed, key=lambda vote: (vote.time, vote.rater))
    return Verdict(kind, last.value, last.rater, differ=len(by_value) > 1)


def learned(
    turn: Mapping[str, Any], verdict: Verdict | None, adapter: tuple[str, str], group: Any
) -> tuple[dict[str, Any], Use]:
    """The row that `validate` reads, with the answer that people gave where they gave one, and its use.

    Its group is what data.group names of the row, or else the rater, who so counts once, or else the session. Raises
    DataError: the log does not say which version answered.
    """
    rater = (verdict.rater if verdict else "") or turn["user"]
    served_by, group = _served_by(turn["models"], *adapter), group or rater or turn["session"]
    row = {**turn, "served_by": served_by, "rater": rater, "group": group, "origin": "own"}
    if verdict is None:
        return row, "unrated"
    if verdict.kind is None:
        return row, "raters_disagree"
    if verdict.kind == "rating":
        return row, "good" if verdict.value else "rated_bad"
    own, right = turn["messages"][-1], verdict.value
    right = {**(right if isinstance(right, Mapping) else {"content": right}), "role": "assistant"}
    is_same = str(own.get("content") or "").strip() == right.get("content") and not own.get("tool_calls")
    # An edit that changes nothing leaves the model's own words; who labels an answer says what is right anyway.
    origin: Origin = "labelled" if verdict.kind != "edited" else "own" if is_same else "edited"
    row |= {"messages": [*turn["messages"][:-1], right], "origin": origin}
    return row, "good" if is_same else "corrected"


def _served_by(models: list[str], adapter: str, alias: str) -> str:
    """The version that answered, by the names in the log; another model's name as it is."""
    if version := next((match[1] for name in models if (match := _VERSION.search(name))), ""):
        return version
    name = name_of(next(iter(models), ""))
    of_adapter = rf"(^|[/:]){re.escape(adapter)}(@|$)|(^|[@:]){re.escape(alias)}$"
    if adapter and re.search(of_adapter, name):
        raise DataError(
            f"model is {name!r}, which does not say which version answered: log the response's own model, or ask for "
            f"{adapter}@VERSION"
        )
    return name
