"""What people said of logged answers: the rows of `data.feedback`, and what a logged answer becomes by them."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from components.config.train import DataConfig
from components.prepare.audit import Audit
from components.prepare.dataset import Drawn, Origin
from components.prepare.sources import Source, find_sources, rows_of
from components.prepare.traces import fields_of, first_of, hash_of, name_of
from components.registry.between_runs import NONE_ERASED, Erased
from components.registry.identity import ID_DIGITS
from components.shared.errors import DataError
from components.shared.metrics import normal

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
OF_AUDIT = "audit"
"""The column with the name of a draw, in the files that `fineloop data audit` writes."""
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
    audit: str = ""
    """The name of the draw that the row belongs to."""

    @property
    def is_open(self) -> bool:
        """Whether it is a row of an audit that nobody has labelled yet."""
        return bool(self.audit) and self.value == ""


class Verdict(NamedTuple):
    """What all feedback on one answer comes to."""

    kind: Kind | None
    """None where no more than half of the raters agree."""
    value: Any
    rater: str
    differ: bool
    """Whether raters contradict each other."""
    drawn: Drawn = ""
    """Why versions may be compared on it."""


class Feedback(NamedTuple):
    """All feedback, and what became of its rows."""

    verdicts: Mapping[Key, Verdict] = {}
    rows: int = 0
    unusable: Mapping[str, int] = {}
    """Rows by the reason for which they were not read."""
    audits: Mapping[str, Audit] = {}
    """By name."""


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
    audits: dict[str, Audit] = {}
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
            if vote.audit:
                audit = audits.setdefault(vote.audit, Audit(vote.audit))
                audit.drawn.add(vote.key[1])
                if vote.is_open:
                    continue
                audit.labelled.add(vote.key[1])
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
    whole = {name for name, audit in audits.items() if not audit.flaw}
    return Feedback({key: resolved(votes.values(), whole) for key, votes in last.items()}, rows, unusable, audits)


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
    audit = name_of(fields.get(OF_AUDIT))
    if audit and kind == "rating":
        return Vote(("", response), "label", "", "", criterion, -math.inf, audit)
    value: Any = row.get(kind, fields.get(kind))
    if kind == "rating":
        value = _is_good(first_of(fields, *_SCORE), first_of(fields, *_WORD), least)
    elif not isinstance(value, Mapping):  # an answer may be a text of JSON
        value = str(value).strip()
    rater, time = hash_of(first_of(fields, *_RATER)), _seconds(first_of(fields, *_TIME))
    return Vote((key, own) if own and not audit else ("", response), kind, value, rater, criterion, time, audit)


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


def resolved(votes: Iterable[Vote], whole: Collection[str] = ()) -> Verdict:
    """What the last vote of each rater comes to: the strongest kind counts, and of it what more than half say. `whole`
    are the audits whose labels may judge.

    An edit or a label of somebody who chose the answer himself counts no more than a rating of somebody else: where
    as many or more like the answer as it is, it is not put right.
    """
    votes = list(votes)
    strongest = max(_strength(vote, whole) for vote in votes)
    counting = [vote for vote in votes if _strength(vote, whole) == strongest]
    by_value: dict[str, list[Vote]] = {}
    for vote in counting:
        by_value.setdefault(json.dumps(vote.value, sort_keys=True, default=str), []).append(vote)
    agreed = max(by_value.values(), key=len)
    last = max(agreed, key=lambda vote: (vote.time, vote.rater))
    drawn: Drawn = "outcome" if last.kind == "outcome" else "audit" if last.audit in whole else ""
    if last.kind != "rating" and not drawn:
        content_with = {vote.rater for vote in votes if vote.kind == "rating" and vote.value}
        content_with -= {vote.rater for vote in counting}
        if len(content_with) > len(agreed):
            return Verdict("rating", True, max(content_with), differ=True)
        if len(content_with) == len(agreed):
            return Verdict(None, None, "", differ=True)
    if 2 * len(agreed) <= len(counting):
        return Verdict(None, None, "", differ=True)
    return Verdict(last.kind, last.value, last.rater, differ=len(by_value) > 1, drawn=drawn)


def _strength(vote: Vote, whole: Collection[str]) -> tuple[bool, bool, int]:
    """Outcomes are the strongest, then labels of what a hash drew."""
    return vote.kind == "outcome", vote.audit in whole, _KINDS.index(vote.kind)


def learned(
    turn: Mapping[str, Any], verdict: Verdict | None, adapter: tuple[str, str], group: Any
) -> tuple[dict[str, Any], Use]:
    """The row that `validate` reads, with the answer that people gave where they gave one, and its use.

    Its group is what data.group names of the row, or else the session. Raises DataError: the log does not say which
    version answered.
    """
    row = {
        **turn,
        "served_by": _served_by(turn["models"], *adapter),
        "rater": (verdict.rater if verdict else "") or turn["user"],
        "group": group or turn["session"],
        "origin": "own",
        "drawn": verdict.drawn if verdict else "",
    }
    if verdict is None:
        return row, "unrated"
    if verdict.kind is None:
        return row, "raters_disagree"
    if verdict.kind == "rating":
        return row, "good" if verdict.value else "rated_bad"
    own, right = turn["messages"][-1], verdict.value
    right = {**(right if isinstance(right, Mapping) else {"content": right}), "role": "assistant"}
    if _are_same(own, right):
        return row, "good"
    origin: Origin = "edited" if verdict.kind == "edited" else "labelled"
    row |= {"messages": [*turn["messages"][:-1], right], "origin": origin}
    return row, "corrected"


def _are_same(own: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two answers are the same words, as exact match compares them; one with calls is the same as no other."""
    if own.get("tool_calls") or right.get("tool_calls"):
        return False
    return normal(str(own.get("content") or "")) == normal(str(right.get("content") or ""))


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
