"""One row in, one normalised record or one clear reason out. Every source passes through here, the example too.

A row is an object in one of two forms, as it came or as `shapes` made it, each with an optional `id`; other columns are
ignored:

    {"prompt": "ICD-10 chapter: Mpox", "completion": "Infections"}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

`prompt` may also be a list of messages and `completion` a list of one assistant message (TRL's conversational form).
Beside either form `tools` may list the tools that can be called, as JSON Schemas of functions; an assistant's message
may have tool_calls, and a tool's message a result, as chat templates read them. Lists may be JSON text, as in Parquet.
An assistant's message with weight 0 (OpenAI's) is context, and not an answer to learn.
"""

import contextlib
import hashlib
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from components.config.train import LossOn
from components.prepare.dataset import WEIGHT, Message, Record, Role
from components.shared.errors import DataError

KNOWN_COLUMNS = ("id", "prompt", "completion", "messages", "tools")
EXPECTED = "prompt and completion, or messages (a list of {role, content} that ends with the assistant's answer)"
_TEXT_PARTS = ("text", "input_text", "output_text")

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
"""The roles of messages, of which OpenAI renamed one."""
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""The names of the roles in other formats."""
# Fields of a tool's message beside its result.
_OF_A_RESULT = ("tool_call_id", "name")
_READ_OF_ALL = frozenset({"role", "content", "tool_calls", "function_call", WEIGHT})
_MAX_VALUE_CHARS = 40
MAX_TEXT_CHARS = 16 * 2**20
"""Bound on one text, the same as on a line of JSONL: a cell of Parquet may unpack to far more than its file holds."""
MAX_NAME_CHARS = 4096
"""Bound on an id or a group's name."""
ID_DIGITS = 16
"""Hex digits of the content's hash that are the id of a row without one."""
NOTHING = itertools.repeat("")
MAX_MARKS = 30
"""Bound on combining characters in a row, as in Unicode's Stream-Safe Text Format (UAX #15, section 13): sorting them
takes time quadratic in their number, and no language uses more."""


class Hashes(NamedTuple):
    """The hashes that decide the split and the duplicates of some records: lists of the fields of `KeyedRecord`."""

    key: list[bytes]
    place: list[bytes]
    content: list[bytes]
    asked: list[bytes]


@dataclass(frozen=True, slots=True)
class KeyedRecord:
    """A record with the hashes that decide its split and its duplicates."""

    record: Record
    key: bytes
    """sha256 of what identifies the record: its id when the row gave one, else its prompt."""
    place: bytes
    """sha256 of what decides its split: its group where it has one, else its key."""
    content: bytes
    """sha256 of prompt and answer."""
    asked: bytes
    """sha256 of the prompt's turns."""
    named: bool
    """Whether the row gave an id."""


def has_known_form(columns: tuple[str, ...]) -> bool:
    """Whether a row with these columns is in one of the two forms."""
    return "messages" in columns or ("prompt" in columns and "completion" in columns)


def validate(
    row: object,
    *,
    group: str = "",
    source: str = "",
    loss_on: LossOn = "last",
    screen: Callable[[Message], Message] = lambda message: message,
) -> KeyedRecord:
    """Turn one row into a record in NFC without trailing whitespace; `group` is the column that names its group.

    `screen` returns each message as it may be used. With `loss_on` all, a conversation ends with the last answer that
    is to be learned.

    Raises:
        DataError: the row is unusable; the message is the reason alone, without file and line.
    """
    if not isinstance(row, dict):
        raise DataError(f"row is {_kind(row)}: expected an object with {EXPECTED}")
    messages = row.get("messages")
    prompt = row.get("prompt")
    completion = row.get("completion")
    if messages is not None:
        if prompt is not None or completion is not None:
            raise DataError("row has messages and also prompt or completion: keep one form")
        turns, field = _messages(messages, "messages"), "messages"
        if turns[-1].role != "assistant":
            raise DataError(f"the last message is from {turns[-1].role!r}: expected assistant, who gives the answer")
    else:
        asked = _messages(prompt, "prompt") if isinstance(prompt, list) else [Message("user", _text(prompt, "prompt"))]
        turns, field = [*asked, _completion(completion)], "prompt"
    learned = [place for place, turn in enumerate(turns) if turn.role == "assistant" and turn.is_learned]
    if not learned or (loss_on == "last" and learned[-1] < len(turns) - 1):
        advice = "; data.loss_on=all learns from the earlier ones" if learned else ""
        raise DataError(f"the answer has weight 0, so that nothing of the row would be learned{advice}")
    *turns, answer = turns[: learned[-1] + 1]
    if not any(turn.role == "user" for turn in turns):
        raise DataError(f"{field} has no user message before the answer")
    belongs_to = _name(row.get(group), group) if group else ""
    turns = [screen(turn) for turn in turns]
    return _keyed(row.get("id"), turns, screen(answer), _tools(row.get("tools")), belongs_to, source)


def named_id(value: object) -> str | None:
    """The id that a row gives with this value; None where it gives none, or an invalid one."""
    try:
        return _name(value, "id")
    except DataError:
        return None


def unread_keys(row: Mapping[str, Any]) -> set[str]:
    """The keys with a value in the row's messages that nothing is read from, as `messages[].KEY`."""
    found = set()
    for field in ("messages", "prompt", "completion"):
        turns = row.get(field)
        if field == "messages" and isinstance(turns, str):
            with contextlib.suppress(ValueError, RecursionError):
                turns = json.loads(turns)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, Mapping) and len(turn) > 2:
                read = _READ_OF_ALL.union(_OF_A_RESULT if turn.get("role") == "tool" else ())
                found |= {f"{field}[].{key}" for key in turn.keys() - read if turn[key] not in (None, "", [], {})}
    return found


def ids_of(row: KeyedRecord) -> tuple[str, ...]:
    """The ids that the record may have in a dataset: the one that its row gave, or else those from its content."""
    return (row.record.id,) if row.named else (row.content.hex()[:ID_DIGITS], row.content.hex())


def canonical_turn(role: str, content: str, more: str = "") -> str:
    """The turn as a string that stays unambiguous when turns are concatenated."""
    said = f"{role}:{len(content)}:{content}"
    return f"{said}+{len(more)}:{more}" if more else said


def canonical_prompt(turns: Iterable[tuple[str, str, str]]) -> str:
    """The prompt as one unambiguous string: equal exactly when the turns are equal."""
    return "".join([canonical_turn(*turn) for turn in turns])


def hashed(
    prompts: Iterable[str],
    answers: Iterable[str],
    ids: Iterable[str],
    groups: Iterable[str],
    calls: Iterable[str] = NOTHING,
    tools: Iterable[str] = NOTHING,
    unlearned: Iterable[str] = NOTHING,
) -> Hashes:
    """The hashes of records with these canonical prompts; `ids` are those that their rows gave, or empty.

    `unlearned` names the turns of weight 0: they are part of the content, while the prompt stays the same.

    Raises:
        UnicodeEncodeError: a text holds a lone surrogate.
    """
    found, sha256 = Hashes([], [], [], []), hashlib.sha256
    given = zip(prompts, answers, ids, groups, calls, tools, unlearned, strict=False)
    for prompt, answer, name, group, call, tool, left in given:
        said = sha256(prompt.encode())
        found.asked.append(said.digest())
        more = f"tools:{len(tool)}:{tool}" if tool else ""
        said.update(f"{more}{left}answer:{answer}{f'calls:{call}' if call else ''}".encode())
        found.content.append(said.digest())
        key = sha256((f"id:{name}" if name else f"prompt:{prompt}{more}").encode()).digest()
        found.key.append(key)
        found.place.append(sha256(f"group:{group}".encode()).digest() if group else key)
    return found


def _keyed(row_id: object, turns: list[Message], answer: Message, tools: str, group: str, source: str) -> KeyedRecord:
    calls = _json(json.loads(answer.more)["tool_calls"]) if answer.more else ""
    named = row_id is not None
    if row_id == "":
        raise DataError("id is empty: give it a value or leave it out")
    record_id = _name(row_id, "id") if named else ""
    unlearned = [place for place, turn in enumerate(turns) if not turn.is_learned]
    prompt = canonical_prompt([turn if turn.is_learned else _weightless(turn) for turn in turns])
    left = f"unlearned:{unlearned}" if unlearned else ""
    try:
        hashes = hashed([prompt], [answer.content], [record_id], [group], [calls], [tools], [left])
    except UnicodeEncodeError as exc:
        raise DataError(f"text is not valid Unicode: lone surrogate {exc.object[exc.start]!r}") from exc
    record_id = record_id or hashes.content[0].hex()[:ID_DIGITS]
    record = Record(record_id, turns, answer.content, calls, tools, group, source)
    key, place, content, asked = (column[0] for column in hashes)
    return KeyedRecord(record, key, place, content, asked, named)


def _weightless(turn: Message) -> Message:
    more = {key: value for key, value in json.loads(turn.more).items() if key != WEIGHT}
    return turn._replace(more=_json(more) if more else "")


def _name(value: object, field: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{field} is {_kind(value)}{': expected text or a whole number' if value is not None else ''}")
    if value == "":
        raise DataError(f"{field} is empty")
    name = str(value)
    if len(name) > MAX_NAME_CHARS:
        raise DataError(f"{field} has {len(name)} characters: expected at most {MAX_NAME_CHARS}")
    return name


def _completion(completion: object) -> Message:
    if isinstance(completion, list):
        turns = _messages(completion, "completion")
        if len(turns) != 1 or turns[0].role != "assistant":
            raise DataError(
                f"completion has messages from {', '.join(turn.role for turn in turns)[:_MAX_VALUE_CHARS]}: "
                "expected one, from assistant"
            )
        return turns[0]
    return Message("assistant", _text(completion, "completion"))


def _messages(messages: object, field: str) -> list[Message]:
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = _parsed(messages, field)
    if not isinstance(messages, list):
        raise DataError(f"{field} is {_kind(messages)}: expected a list of {{role, content}}")
    if not messages:
        raise DataError(f"{field} is an empty list")
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(messages)]


def _message(message: object, field: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{field} is {_kind(message)}: expected {{role, content}}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = "from" in message or str(role) in SPEAKERS
        advice = f"; data.columns.messages={field.partition('[')[0]} reads such turns" if known else ""
        raise DataError(f"{field}.role is {_value(role)}: expected system, user, assistant or tool{advice}")
    if message.get("function_call"):
        raise DataError(f"{field} has function_call: write it as tool_calls")
    more: dict[str, Any] = {}
    if message.get("tool_calls"):
        if role != "assistant":
            raise DataError(f"{field} has tool_calls and is from {role}: an assistant's message alone may call")
        more["tool_calls"] = _calls(message["tool_calls"], f"{field}.tool_calls")
    if role == "tool":
        more |= {name: _text(message[name], f"{field}.{name}") for name in _OF_A_RESULT if message.get(name)}
    weight = message.get(WEIGHT)
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"{field}.weight is {weight!r:.40}: expected 0, which is not learned, or 1")
    if weight == 0 and role == "assistant":
        more[WEIGHT] = 0
    content = _content(message.get("content"), f"{field}.content")
    said_nothing = content is None or (isinstance(content, str) and not content.strip())
    text = "" if "tool_calls" in more and said_nothing else _text(content, f"{field}.content")
    return Message(ROLES[role], text, _json(more) if more else "")


def _content(content: object, field: str) -> object:
    """The content as text. OpenAI's text parts are joined by newlines, as vLLM passes them to a template."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if not isinstance(part, Mapping) or kind not in _TEXT_PARTS:
            raise DataError(
                f"{field}[{index}] is of type {_value(kind)}: expected text, as models read nothing else here"
            )
        texts.append(_text(part.get("text"), f"{field}[{index}].text"))
    return "\n".join(texts)


def _calls(calls: object, field: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates read them: the arguments an object, not the JSON text that APIs make of them."""
    result: list[dict[str, Any]] = []
    for index, call in enumerate(_list(calls, field)):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{field}[{index}] names no function: expected {{function: {{name, arguments}}}}")
        arguments = _parsed(function.get("arguments", {}), f"{field}[{index}].function.arguments")
        if not isinstance(arguments, Mapping):
            raise DataError(f"{field}[{index}].function.arguments is {_kind(arguments)}: expected an object")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        result.append({**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _tools(tools: object) -> str:
    if tools is None:
        return ""
    listed = _list(tools, "tools")
    for index, tool in enumerate(listed):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"tools[{index}] names no function: expected {{type, function: {{name, parameters}}}}")
    return _json(listed) if listed else ""


def _list(value: object, field: str) -> list[Any]:
    parsed = _parsed(value, field)
    if not isinstance(parsed, list):
        raise DataError(f"{field} is {_kind(parsed)}: expected a list")
    return parsed


def _parsed(value: object, field: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{field} is text that is not JSON: {exc}") from exc


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise DataError(f"tools and their calls must be JSON: {exc}") from exc


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{field} is {_kind(value)}{': expected text' if value is not None else ''}")
    _require_bounded(value, field)
    text = unicodedata.normalize("NFC", value).rstrip()
    if not text:
        raise DataError(f"{field} is empty")
    return text


def _require_bounded(text: str, field: str) -> None:
    if len(text) > MAX_TEXT_CHARS:
        raise DataError(f"{field} has {len(text)} characters: expected at most {MAX_TEXT_CHARS}")
    if not unicodedata.is_normalized("NFC", text) and _most_marks(text) > MAX_MARKS:
        raise DataError(f"{field} has more than {MAX_MARKS} combining characters in a row")


def _most_marks(text: str) -> int:
    """The largest number of combining characters in a row."""
    runs = itertools.groupby(text, key=lambda each: unicodedata.combining(each) > 0)
    return max((sum(1 for _ in run) for is_mark, run in runs if is_mark), default=0)


def _value(value: object) -> str:
    if isinstance(value, str):
        return repr(value[:_MAX_VALUE_CHARS])
    return _kind(value)


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    kinds: dict[Any, str] = {str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return kinds.get(type(value), f"a {type(value).__name__}")
