"""A model's logged answers, and what people said of them, as records to learn from; pure.

A row is a request with its response as gateways log them in OpenAI's format, nested or flat (LiteLLM's
StandardLoggingPayload, Langfuse's observations), or an event or span of OpenTelemetry's GenAI conventions
(github.com/open-telemetry/semantic-conventions-genai, docs/gen-ai/gen-ai-events.md).
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from components.prepare.dataset import WEIGHT, Origin
from components.registry.between_runs import user_hash
from components.registry.identity import ID_DIGITS
from components.shared.errors import DataError

Row = Mapping[str, Any]
Use = Literal["good", "corrected", "rated_bad", "raters_disagree", "unrated"]
"""What becomes of a logged answer."""
LEARNED: tuple[Use, ...] = ("good", "corrected")
_MAX_NAME_CHARS = 1000

# Where each fact may be: a field with this name, dots included, or a field within fields.
_ID = ("response.id", "gen_ai.response.id", "id")
_MODEL = (
    "gen_ai.response.model", "response.model", "model", "request.model", "gen_ai.request.model", "provided_model_name",
    "providedModelName",
)  # fmt: skip
_USER = (
    "end_user", "user_id", "userId", "user.id", "enduser.id", "user", "request.user", "request.safety_identifier",
)  # fmt: skip
_SESSION = (
    "session_id", "sessionId", "gen_ai.conversation.id", "session.id", "conversation_id", "request.metadata.session_id",
    "metadata.session_id", "trace_id", "traceId",
)  # fmt: skip
_ASKED = ("request.messages", "messages", "gen_ai.input.messages", "input.messages", "input")
_TOOLS = ("request.tools", "tools", "gen_ai.tool.definitions", "model_parameters.tools")
_CHOICES = ("response.choices", "choices", "output.choices")
_OTHERS = (
    "attributes", "object", "output", "status", "type", "gen_ai.output.messages", "gen_ai.response.finish_reasons",
    "gen_ai.system_instructions",
)  # fmt: skip
_PATHS = (*_ID, *_MODEL, *_USER, *_SESSION, *_ASKED, *_TOOLS, *_CHOICES, *_OTHERS)
COLUMNS = tuple(dict.fromkeys(column for path in _PATHS for column in (path, path.partition(".")[0])))
"""The columns that are read, beside data.feedback_key."""
_VERSION = re.compile(rf"(?:^|[@:/])(v[0-9a-f]{{{ID_DIGITS}}})$")
"""The version in NAME@VERSION (the resolver for vLLM), BASE:VERSION (Ray Serve LLM) and VERSION (vLLM)."""
_UNFINISHED = ("length", "max_tokens", "content_filter", "error")


def are_traces(columns: Collection[str]) -> bool:
    """Whether rows with these columns are logged requests."""
    has = set(columns)
    return (
        ({"request", "response"} <= has and bool(has & {"id", "model"}))
        or ({"id", "model", "messages"} <= has and bool(has & {"response", "choices"}))
        or ({"input", "output"} <= has and bool(has & {"trace_id", "traceId"}))
        or ("attributes" in has and bool(has & {"trace_id", "traceId", "event_name", "eventName"}))
        or "gen_ai.output.messages" in has
    )


def as_turn(row: Row) -> dict[str, Any]:
    """The request's messages and the answer, with what else the log says: id, tools, session, user (hashed), models.

    Earlier answers are context, since nobody judged them here.

    Raises:
        DataError: the request failed, or its answer is missing, cut or a part of a stream.
    """
    facts = _facts(row)
    answer, asked = _answer(row, facts), first_of(facts, *_ASKED)
    if not isinstance(asked, list):
        asked = [{"role": "user", "content": row.get("input", asked)}]
    messages = [turn for place, message in enumerate(asked) for turn in _turns(message, f"messages[{place}]")]
    if system := facts.get("gen_ai.system_instructions"):
        messages = [*_turns({"role": "system", "parts": system}, "gen_ai.system_instructions"), *messages]
    context = [{**turn, WEIGHT: 0} if turn.get("role") == "assistant" else turn for turn in messages]
    named = {"id": first_of(facts, *_ID), "tools": first_of(facts, *_TOOLS)}
    return {
        "messages": [*context, answer],
        **{name: value for name, value in named.items() if value is not None},
        "response_id": named["id"],
        "session": _name(first_of(facts, *_SESSION)),
        "user": _hashed(first_of(facts, *_USER)),
        "models": [name for path in _MODEL if isinstance(name := first_of(facts, path), str)],
    }


def user_of(row: Row) -> str:
    """The hash of the user who asked; empty where the log names none."""
    return _hashed(first_of(_facts(row), *_USER))


def first_of(facts: Row, *paths: str) -> Any:
    """The first value that is there: of a field with this name, dots included, or of a field within fields."""
    for path in paths:
        value = facts.get(path)
        if value is None and "." in path:
            value = facts
            for part in path.split("."):
                value = _parsed(value.get(part)) if isinstance(value, Mapping) else None
        if value not in (None, "", [], {}):
            return value
    return None


def _facts(row: Row) -> dict[str, Any]:
    """The row's cells, JSON text parsed, and the attributes of an event or span beside its own fields."""
    cells = {name: _parsed(value) for name, value in row.items()}
    attributes = cells.get("attributes")
    return (
        cells | {name: _parsed(value) for name, value in attributes.items()} if isinstance(attributes, dict) else cells
    )


def _parsed(value: Any) -> Any:
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # a text that only begins like JSON


def _answer(row: Row, facts: Row) -> dict[str, Any]:
    if facts.get("status") == "failure":
        raise DataError("the request failed: it has no answer")
    if (kind := str(facts.get("type", ""))[:20]).isupper() and kind != "GENERATION":  # of Langfuse's observations
        raise DataError(f"a {kind.lower()} is no answer of a model: export generations alone")
    choices, outputs = first_of(facts, *_CHOICES), facts.get("gen_ai.output.messages")
    given = next((each[:1] for each in (choices, outputs) if isinstance(each, list)), [])
    first: Row = given[0] if given and isinstance(given[0], Mapping) else {}
    if "delta" in first or str(first_of(facts, "response.object", "object")).endswith(".chunk"):
        raise DataError("the answer is a part of a stream: log it whole, once it has ended")
    reasons = facts.get("gen_ai.response.finish_reasons")
    finish = first.get("finish_reason") or (reasons[0] if isinstance(reasons, list) and reasons else None)
    if finish in _UNFINISHED:
        raise DataError(f"the answer was cut: its finish_reason is {finish}")
    message = (first.get("message") if choices else first) or first_of(facts, "output", "response")
    if not isinstance(message, Mapping) or not {"content", "tool_calls", "parts"} & message.keys():
        message = {
            "content": next((row[name] for name in ("output", "response") if isinstance(row.get(name), str)), None)
        }
        if message["content"] is None:
            raise DataError("the response has no message: expected choices[0].message or gen_ai.output.messages")
    turns = _turns({**message, "role": "assistant"}, "the answer")
    return {key: value for key, value in turns[-1].items() if key != "finish_reason"}


def _turns(message: Any, field: str) -> list[dict[str, Any]]:
    """OpenTelemetry's message of parts as OpenAI's messages, reasoning left out; others as they are."""
    if not isinstance(message, Mapping) or not isinstance(message.get("parts"), list):
        return [message if isinstance(message, dict) else {"content": message}]
    texts, calls, results = [], [], []
    for part in message["parts"]:
        match part.get("type") if isinstance(part, Mapping) else part:
            case "text":
                texts.append(str(part.get("content") or ""))
            case "tool_call":
                function = {"name": part.get("name"), "arguments": part.get("arguments") or {}}
                calls.append({"id": part.get("id"), "type": "function", "function": function})
            case "tool_call_response":
                result = part.get("response")
                text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
                results.append({"role": "tool", "tool_call_id": part.get("id"), "content": text})
            case "reasoning":
                pass
            case kind:
                raise DataError(f"{field} has a part of type {str(kind)[:40]!r}: expected text or tool calls")
    turn = {"role": message.get("role"), "content": "\n".join(texts), **({"tool_calls": calls} if calls else {})}
    return results or [turn]


def _name(value: Any) -> str:
    return str(value)[:_MAX_NAME_CHARS] if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _hashed(value: Any) -> str:
    return user_hash(name) if (name := _name(value)) else ""


# What people said of the answers.

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


def vote_of(row: Row, *, key: str, least: float | None) -> Vote:
    """The feedback that a row holds; `key` is data.feedback_key, and `least` data.feedback_good.

    Raises:
        DataError: it names no answer, or says nothing of it that can be read.
    """
    facts = _facts(row)
    own, response, criterion = (_name(first_of(facts, *paths)) for paths in ((key,), _RESPONSE, _CRITERION))
    if not own and not response:
        raise DataError(f"it names no answer: expected response_id{f' or {key}' if key else ''}")
    kind: Kind = next((each for each in _KINDS[:0:-1] if facts.get(each) not in (None, "")), "rating")
    value: Any = row.get(kind, facts.get(kind))
    if kind == "rating":
        value = _is_good(first_of(facts, *_SCORE), first_of(facts, *_WORD), least)
    elif not isinstance(value, Mapping):  # an answer may be a text of JSON
        value = str(value).strip()
    time = _seconds(first_of(facts, *_TIME))
    rater = _hashed(first_of(facts, *_RATER))
    return Vote((key, own) if own else ("", response), kind, value, rater, criterion, time)


def _is_good(score: Any, word: Any, least: float | None) -> bool:
    known = re.sub(r"[ -]", "_", str(word).strip().lower())
    if known in _GOOD | _BAD:
        return known in _GOOD
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

    Its group is what data.group names of the row, or else the rater, who so counts once, or else the session.

    Raises:
        DataError: the log does not say which version answered.
    """
    rater = (verdict.rater if verdict else "") or turn["user"]
    row = {
        **turn,
        "served_by": _served_by(turn["models"], *adapter),
        "rater": rater,
        "group": group or rater or turn["session"],
        "origin": "own",
    }
    if verdict is None:
        return row, "unrated"
    if verdict.kind is None:
        return row, "raters_disagree"
    if verdict.kind == "rating":
        return row, "good" if verdict.value else "rated_bad"
    own, right = (
        turn["messages"][-1],
        verdict.value if isinstance(verdict.value, Mapping) else {"content": verdict.value},
    )
    is_same = str(own.get("content") or "").strip() == right.get("content") and not own.get("tool_calls")
    # An edit that changes nothing leaves the model's own words; who labels an answer says what is right anyway.
    origin: Origin = "labelled" if verdict.kind != "edited" else "own" if is_same else "edited"
    messages = [*turn["messages"][:-1], {**right, "role": "assistant"}]
    return {**row, "messages": messages, "origin": origin}, "good" if is_same else "corrected"


def _served_by(models: list[str], adapter: str, alias: str) -> str:
    """The version that answered, by the names in the log; another model's name as it is."""
    if version := next((match[1] for name in models if (match := _VERSION.search(name))), ""):
        return version
    name = models[0][:_MAX_NAME_CHARS] if models else ""
    of_adapter = rf"(^|[/:]){re.escape(adapter)}(@|$)|(^|[@:]){re.escape(alias)}$"
    if adapter and re.search(of_adapter, name):
        raise DataError(
            f"model is {name!r}, which does not say which version answered: log the response's own model, or ask for "
            f"{adapter}@VERSION"
        )
    return name
