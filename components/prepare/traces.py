"""Logged requests and their answers, as conversations; pure.

A row is a request with its response as gateways log them in OpenAI's format, nested or flat (LiteLLM's
StandardLoggingPayload, Langfuse's observations), or an event or span of OpenTelemetry's GenAI conventions
(github.com/open-telemetry/semantic-conventions-genai, docs/gen-ai/gen-ai-events.md).
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from components.prepare.dataset import WEIGHT
from components.registry.between_runs import user_hash
from components.shared.errors import DataError

Row = Mapping[str, Any]
_MAX_NAME_CHARS = 1000

_FORMS = (
    "request response id", "request response model", "request response trace_id", "request_body response_body",
    "id model messages response", "request_id messages response", "id model messages choices", "id model input choices",
    "object input output", "run_type inputs outputs", "attributes context",
    "request response timestamp", "question response model created_at", "SpanAttributes TraceId",
    "input output trace_id", "input output traceId", "attributes trace_id", "attributes traceId",
    "attributes event_name", "attributes eventName", "gen_ai.output.messages",
)  # fmt: skip
"""The columns that rows of a form have, each form's in one text."""
WHERE = {
    fact: paths.split()
    for fact, paths in {
        "id": "response.id response_body.id outputs.id gen_ai.response.id id request_id",
        "model": "gen_ai.response.model response.model response_body.model outputs.model model request.model "
        "gen_ai.request.model provided_model_name providedModelName",
        "user": "end_user user_id userId user.id enduser.id user request.user request.safety_identifier",
        "session": "session_id sessionId gen_ai.conversation.id session.id conversation_id request.metadata.session_id "
        "metadata.session_id trace_id traceId TraceId",
        "system": "gen_ai.system_instructions",
        "instructions": "instructions",
        "messages": "request.messages request_body.messages messages gen_ai.input.messages inputs.messages "
        "input.messages input question",
        "tools": "request.tools request_body.tools tools gen_ai.tool.definitions model_parameters.tools",
        "answer": "response.choices.0.message response_body.choices.0.message outputs.choices.0.message "
        "choices.0.message output.choices.0.message gen_ai.output.messages.0 output response",
        "chunk": "response.choices.0.delta response_body.choices.0.delta choices.0.delta output.choices.0.delta",
        "finish": "response.choices.0.finish_reason response_body.choices.0.finish_reason "
        "outputs.choices.0.finish_reason choices.0.finish_reason output.choices.0.finish_reason "
        "gen_ai.output.messages.0.finish_reason gen_ai.response.finish_reasons.0 incomplete_details.reason",
        "object": "response.object object",
        "status": "status",
        "type": "type",
    }.items()
}
"""Where each fact may stand, as `first_of` reads it: in one format at one of the paths, in another at another."""
_PATHS = [path.partition(".0")[0] for paths in WHERE.values() for path in paths]
COLUMNS = (
    "attributes",
    "SpanAttributes",
    *dict.fromkeys(column for path in _PATHS for column in (path, path.partition(".")[0])),
)
"""The columns that are read, beside data.feedback_key."""


def are_traces(columns: Collection[str]) -> bool:
    """Whether rows with these columns are logged requests."""
    return any(set(columns).issuperset(form.split()) for form in _FORMS)


def as_turn(row: Row) -> dict[str, Any]:
    """The request's messages and the answer, with what else the log says: id, tools, session, user (hashed), models.

    Earlier answers are context, since nobody judged them here. Raises DataError: the request failed, or its answer is
    missing, cut or a part of a stream.
    """
    fields = fields_of(row)
    log = {fact: first_of(fields, *paths) for fact, paths in WHERE.items()}
    answer, messages = _answer(row, log), log["messages"]
    if not isinstance(messages, list):
        messages = [{"role": "user", "content": row.get("input", messages)}]
    turns = [turn for place, message in enumerate(messages) for turn in _turns(message, f"messages[{place}]")]
    if log["instructions"]:
        turns = [{"role": "system", "content": log["instructions"]}, *turns]
    if log["system"]:
        turns = [*_turns({"role": "system", "parts": log["system"]}, "gen_ai.system_instructions"), *turns]
    context = [{**turn, WEIGHT: 0} if turn.get("role") == "assistant" else turn for turn in turns]
    return {
        "messages": [*context, answer],
        **{name: log[name] for name in ("id", "tools") if log[name] is not None},
        "response_id": log["id"],
        "session": name_of(log["session"]),
        "user": hash_of(log["user"]),
        "models": [name for path in WHERE["model"] if isinstance(name := first_of(fields, path), str)],
    }


def user_of(row: Row) -> str:
    """The hash of the user who asked; empty where the log names none."""
    return hash_of(first_of(fields_of(row), *WHERE["user"]))


def fields_of(row: Row) -> dict[str, Any]:
    """The row's fields, JSON text parsed, and beside them the attributes of an event or span."""
    fields = {name: _parsed(value) for name, value in row.items()}
    attributes = fields.get("attributes", fields.get("SpanAttributes"))
    return fields | fields_of(attributes) if isinstance(attributes, dict) else fields


def first_of(fields: Row, *paths: str) -> Any:
    """The first value that is there, of a field with this name, dots included, or of a field within fields, where 0 is
    the first of a list; None if none is."""
    return next((value for path in paths if (value := _at(fields, path)) not in (None, "", [], {})), None)


def _at(fields: Row, path: str) -> Any:
    above, dot, name = path.rpartition(".")
    if not dot or fields.get(path) is not None:
        return fields.get(path)
    value = _at(fields, above)
    if isinstance(value, list):
        value = {"0": value[0]} if value else None
    return _parsed(value.get(name)) if isinstance(value, Mapping) else None


def _parsed(value: Any) -> Any:
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # a text that only begins like JSON


def _answer(row: Row, log: Row) -> dict[str, Any]:
    if log["status"] == "failure":
        raise DataError("the request failed: it has no answer")
    if (kind := str(log["type"] or "")[:20]).isupper() and kind != "GENERATION":  # of Langfuse's observations
        raise DataError(f"a {kind.lower()} is no answer of a model: export generations alone")
    if log["chunk"] or str(log["object"]).endswith(".chunk"):
        raise DataError("the answer is a part of a stream: log it whole, once it has ended")
    if log["finish"] in ("length", "max_tokens", "max_output_tokens", "content_filter", "error"):
        raise DataError(f"the answer was cut: its finish_reason is {log['finish']}")
    message = log["answer"]
    if isinstance(message, list):  # of OpenAI's Responses; one with calls of tools has no single message
        said = [item for item in message if not isinstance(item, Mapping) or item.get("type") != "reasoning"]
        message = said[0] if len(said) == 1 else None
    if not isinstance(message, Mapping) or not {"content", "tool_calls", "parts"} & message.keys():
        texts = [row[name] for name in ("output", "response") if isinstance(row.get(name), str)]
        if not texts:
            raise DataError("the response has no message: expected choices[0].message or gen_ai.output.messages")
        message = {"content": texts[0]}  # of JSON too
    turns = _turns({**message, "role": "assistant"}, "the answer")
    return {key: value for key, value in turns[-1].items() if key != "finish_reason"}


def _turns(message: Any, field: str) -> list[dict[str, Any]]:
    """OpenTelemetry's message of parts as OpenAI's messages, reasoning left out; others as they are."""
    if not isinstance(message, Mapping) or not isinstance(message.get("parts"), list):
        return [message if isinstance(message, dict) else {"content": message}]
    texts, calls, results = [], [], []
    for part in message["parts"]:
        match part.get("type") if isinstance(part, Mapping) else type(part).__name__:
            case "text":
                texts.append(str(part.get("content") or ""))
            case "tool_call":
                function = {"name": part.get("name"), "arguments": part.get("arguments") or {}}
                calls.append({"id": part.get("id"), "type": "function", "function": function})
            case "tool_call_response":
                result = part.get("response")
                text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
                results.append({"role": "tool", "tool_call_id": part.get("id"), "content": text})
            case kind if kind != "reasoning":
                raise DataError(f"{field} has a part of type {str(kind)[:40]!r}: expected text or tool calls")
    turn = {"role": message.get("role"), "content": "\n".join(texts), **({"tool_calls": calls} if calls else {})}
    return results or [turn]


def name_of(value: Any) -> str:
    """A text or a whole number as a text of bounded length; empty for anything else."""
    return str(value)[:_MAX_NAME_CHARS] if isinstance(value, str | int) and not isinstance(value, bool) else ""


def hash_of(value: Any) -> str:
    """The hash of a person's name; empty where none is named."""
    return user_hash(name) if (name := name_of(value)) else ""
