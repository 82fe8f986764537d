"""The supported part of OpenAI's chat completions format, for requests and responses; pure functions."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.prepare.dataset import Message
from components.shared.errors import UserError
from ray_jobs.talking.speaker import Said
from ray_jobs.text.chat_format import without_reasoning

UNSERVED = ("tools", "functions", "stop", "logprobs", "response_format", "logit_bias", "seed")
"""Unsupported parameters, which are refused since they would change the answer."""
NEUTRAL: Mapping[str, Any] = {"n": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
"""Parameters that are accepted only at these values."""
ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Request:
    """A validated request."""

    model: str
    turns: Sequence[Message]
    max_tokens: int | None
    temperature: float
    stream: bool


def request(body: Any) -> Request:
    """Parse and validate the body; raises UserError where it is not a request or asks for something unsupported."""
    if not isinstance(body, dict):
        raise UserError("the body is not a JSON object")
    if unserved := [name for name in UNSERVED if body.get(name)]:
        raise UserError(f"{unserved[0]} is not served here")
    if other := [name for name, value in NEUTRAL.items() if body.get(name) not in (None, value)]:
        raise UserError(f"{other[0]} is served at {NEUTRAL[other[0]]} alone")
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise UserError(f"max_tokens {most!r}: expected a whole number above 0")
    temperature = body.get("temperature") or 0.0
    if not isinstance(temperature, (int, float)) or not 0 <= temperature <= 2:
        raise UserError(f"temperature {temperature!r}: expected a number from 0 to 2")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError("messages: expected a list with at least one message")
    turns = [_turn(message) for message in messages]
    if turns[-1].role != "user":
        raise UserError(f"messages: the last one is of the {turns[-1].role}, and should be of the user")
    return Request(str(body.get("model", "")), turns, most, float(temperature), bool(body.get("stream")))


def _turn(message: Any) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise UserError(f"messages: role {role!r}: expected {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise UserError("messages: content: expected text, or parts of text")
    # Without reasoning, as in a chat: it is not part of the conversation.
    text = without_reasoning(content) if role == "assistant" else content
    return Message("system" if role == "developer" else role, text)


def models(names: Sequence[str], *, since: int) -> dict[str, Any]:
    """The response to GET /v1/models."""
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": since, "owned_by": "fineloop"} for name in names],
    }


def completion(name: str, said: Said, *, number: int) -> dict[str, Any]:
    """The response to a request without streaming."""
    message = {"role": "assistant", "content": said.text}
    usage = {"prompt_tokens": said.prompt_tokens, "completion_tokens": said.tokens}
    return {
        **_head(name, "chat.completion", number),
        "choices": [{"index": 0, "message": message, "finish_reason": _reason(said), "logprobs": None}],
        "usage": {**usage, "total_tokens": said.prompt_tokens + said.tokens},
    }


def chunk(name: str, delta: Mapping[str, str], *, number: int, said: Said | None = None) -> dict[str, Any]:
    """A chunk of a streamed response; the last one receives `said`, the whole answer."""
    choice = {"index": 0, "delta": dict(delta), "finish_reason": _reason(said) if said else None}
    return {**_head(name, "chat.completion.chunk", number), "choices": [choice]}


def error(message: str, *, kind: str) -> dict[str, Any]:
    """An error response."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _head(name: str, kind: str, number: int) -> dict[str, Any]:
    return {"id": f"chatcmpl-{number}", "object": kind, "created": int(time.time()), "model": name}


def _reason(said: Said) -> str:
    return "stop" if said.ended else "length"
