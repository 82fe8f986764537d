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
import gc
import hashlib
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from components.config.train import ColumnsConfig, DataConfig, LossOn
from components.prepare.dataset import (
    WEIGHT,
    Hashes,
    KeyedRecord,
    Message,
    Record,
    Reject,
    Role,
    keyed_batch,
    keyed_batch_of,
)
from components.prepare.personal import Action, Kind, Screen
from components.prepare.rows import Rows, SourceRow, Unreadable, read_rows
from components.prepare.shapes import SPEAKERS, Row, Shape, as_record, columns_read, is_record, recognised
from components.prepare.sources import Source, local_copies
from components.registry.between_runs import NONE_ERASED, Erased
from components.shared.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa


EXPECTED = "prompt and completion, or messages (a list of {role, content} that ends with the assistant's answer)"
_TEXT_PARTS = ("text", "input_text", "output_text")

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
"""The roles of messages, of which OpenAI renamed one."""
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
    for column in ("messages", "prompt", "completion"):
        turns = row.get(column)
        if column == "messages" and isinstance(turns, str):
            with contextlib.suppress(ValueError, RecursionError):
                turns = json.loads(turns)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, Mapping) and len(turn) > 2:
                read = _READ_OF_ALL.union(_OF_A_RESULT if turn.get("role") == "tool" else ())
                found |= {f"{column}[].{key}" for key in turn.keys() - read if turn[key] not in (None, "", [], {})}
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


# Validates the rows of one source, a batch at a time: into records and rejected rows, with counts of both.


# Turns plain rows into records, a batch at once: with the same result as `validate`, in a tenth of the time.
#
# A row is plain when it holds nothing but texts from system, user and assistant, in NFC, with no hint of personal data.
# `validate` decides on all other rows, and on all that are wrong.

Turns = Sequence[tuple[str, str]]
"""Role and text of each turn; the answer is the last one."""
SPACES = "".join(chr(place) for place in range(0x3001) if chr(place).isspace())
"""All characters that `str.rstrip` strips."""
MOST_CHARS = 2**28
"""Most characters of a batch: an Arrow string array holds less than 2**31 bytes."""
_SPEAKERS = {name: role for name, role in ROLES.items() if role != "tool"}


class Plain(NamedTuple):
    """The plain rows among some rows."""

    places: Sequence[int]
    """The places of the plain rows, as `plain` was given them."""
    batch: "pa.RecordBatch"
    """Their records, with the columns of `keyed_batch`."""


def plain(
    rows: Mapping[int, Mapping[str, Any]],
    group: str,
    source: str,
    changes: "Callable[[pa.Array], npt.NDArray[np.bool_]]",
) -> Plain | None:
    """The plain rows among `rows`, which are given by place; None where `validate` has to decide on all of them.

    `group` and `source` are as for `validate`. `changes` returns one flag per text: whether a screen has to look at it.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    places, names, groups, turns = _in_columns(rows, group)
    texts = [text for each in turns for _, text in each]
    if not places or sum(map(len, texts)) > MOST_CHARS:
        return None
    try:
        contents = pc.utf8_rtrim(pa.array(texts, pa.string()), characters=SPACES)
        "".join([*names, *groups]).encode()
    except UnicodeEncodeError:  # a lone surrogate
        return None
    is_other = changes(contents) | np.array(pc.equal(pc.binary_length(contents), 0))
    for place in np.flatnonzero(~np.array(pc.string_is_ascii(contents))).tolist():
        is_other[place] |= not unicodedata.is_normalized("NFC", texts[place])
    if max(map(len, texts)) > MAX_TEXT_CHARS:
        is_other |= np.fromiter((len(text) > MAX_TEXT_CHARS for text in texts), bool, len(texts))
    sizes = np.fromiter(map(len, turns), np.int64, len(turns))
    kept = ~np.logical_or.reduceat(is_other, np.cumsum(sizes) - sizes)
    if not kept.any():
        return None
    if not kept.all():
        contents = contents.filter(np.repeat(kept, sizes))
        places, names, groups, turns = _kept(kept.tolist(), places, names, groups, turns)
    roles = [role for each in turns for role, _ in each[:-1]]
    return Plain(places, _batch(names, groups, sizes[kept], roles, contents, source))


def _in_columns(
    rows: Mapping[int, Mapping[str, Any]], group: str
) -> tuple[list[int], list[str], list[str], list[Turns]]:
    """Place, id, group and turns of the rows that are plain, as far as this shows without their texts."""
    names = [_plain_name(row.get("id")) for row in rows.values()]
    groups = [_plain_name(row.get(group)) or None for row in rows.values()] if group else [""] * len(rows)
    turns = [_turns(row) for row in rows.values()]
    may_be = [None not in each for each in zip(names, groups, turns, strict=True)]
    return _kept(may_be, list(rows), names, groups, turns)


def _kept(marks: Sequence[bool], *columns: Any) -> Any:
    return tuple(list(compress(column, marks)) for column in columns)


def _plain_name(value: object) -> str | None:
    """An id or a group's name as text; empty where there is none, None where `validate` has to decide."""
    if value is None:
        return ""
    name = str(value) if type(value) is int else value
    return name if type(name) is str and 0 < len(name) <= MAX_NAME_CHARS else None


def _turns(row: Mapping[str, Any]) -> Turns | None:
    """The turns of a row; None where they are more than plain texts."""
    messages, prompt, answer = row.get("messages"), row.get("prompt"), row.get("completion")  # type: Any, Any, Any
    if row.get("tools") is not None or (messages is not None and (prompt is not None or answer is not None)):
        return None
    if messages is None and type(answer) is not str:
        return None
    if type(prompt) is str:
        return ("user", prompt), ("assistant", answer)
    turns = _listed(prompt if messages is None else messages)
    if turns is not None and messages is None:
        turns.append(("assistant", answer))
    is_whole = turns and turns[-1][0] == "assistant" and any(role == "user" for role, _ in turns)
    return turns if is_whole else None


def _listed(messages: object) -> list[tuple[str, str]] | None:
    if type(messages) is not list:
        return None
    turns: list[tuple[str, str]] = []
    for turn in messages:
        if type(turn) is not dict or turn.get("tool_calls") or turn.get("function_call"):
            return None
        if turn.get(WEIGHT) is not None and (type(turn[WEIGHT]) is bool or turn[WEIGHT] != 1):
            return None
        role, content = turn.get("role"), turn.get("content")  # type: Any, Any
        if type(role) is not str or role not in _SPEAKERS or type(content) is not str:
            return None
        turns.append((_SPEAKERS[role], content))
    return turns


def _batch(
    names: Sequence[str],
    groups: Sequence[str],
    sizes: "npt.NDArray[np.int64]",
    roles: Sequence[str],
    contents: "pa.Array",
    source: str,
) -> "pa.RecordBatch":
    """The records of plain rows. `sizes` is the number of turns of each row, `contents` the texts of all turns, and
    `roles` the roles of all turns but the answers."""
    import numpy as np
    import pyarrow as pa

    ends = np.cumsum(sizes - 1)
    is_answer = np.zeros(len(contents), bool)
    is_answer[np.cumsum(sizes) - 1] = True
    asked, answers = contents.filter(~is_answer), contents.filter(is_answer)
    said = list(map(canonical_turn, roles, asked.to_pylist()))
    if len(said) > len(names):
        said = ["".join(said[end - size + 1 : end]) for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)]
    hashes = hashed(said, answers.to_pylist(), names, groups)
    ids = [name or content.hex()[:ID_DIGITS] for name, content in zip(names, hashes.content, strict=True)]
    messages = pa.StructArray.from_arrays(
        [pa.array(roles, pa.string()), asked, pa.repeat("", len(roles))], names=Message._fields
    )
    records = pa.record_batch({
        "id": pa.array(ids, pa.string()),
        "prompt": pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int32()), messages),
        "answer": answers,
        "calls": pa.repeat("", len(names)),
        "tools": pa.repeat("", len(names)),
        "group": pa.array(groups, pa.string()),
        "source": pa.repeat(source, len(names)),
    })  # fmt: skip
    return keyed_batch(records, hashes, list(map(bool, names)))


_MAX_ROW_CHARS, _MAX_SHOWN_CHARS = 2000, 300
_OF_NOBODY_KNOWN = "[withheld: records were erased, and this row has no id that says it is none of them]"


class Validated(NamedTuple):
    """The result of validating some rows."""

    batch: "pa.RecordBatch"
    """The records that may be used, in order, with the columns of `keyed_batch`."""
    rejects: list[Reject]
    withheld: int
    """Number of records that hold personal data, where data.personal leaves them out."""
    erased: int
    """Number of rows of erased records, usable or not."""
    columns: Counter[tuple[str, ...]]
    """Number of rows by the names of all their columns."""
    unread: Counter[str]
    """Number of rows by the keys of their messages that nothing is read from, as `unread_keys` names them."""
    personal: Counter[Kind]
    """Number of pieces of personal data in the records, by kind."""
    with_personal: int
    """Number of records that hold any personal data."""
    shown: list[tuple[str, str]]
    """Shapes that this validation first met in these rows: name, and in words a row and the record that it becomes."""


Judged = KeyedRecord | Reject | Literal["withheld", "erased"]


class Validation:
    """Turns rows into records."""

    def __init__(self, *, group: str, columns: ColumnsConfig, screen: Screen, erased: Erased, loss_on: LossOn) -> None:
        """`group`, `columns` and `loss_on` are keys of data; `screen` sees each message; `erased` rows are counted."""
        self._group, self._columns, self._screen, self._erased = group, columns, screen, erased
        self._validated = partial(validate, group=group, loss_on=loss_on, screen=screen.message)
        self._unread = Counter[str]()
        self._shapes: dict[tuple[str, ...], Shape | None] = {}
        self._shown: dict[str, str] = {}
        self._as_they_are: set[tuple[str, ...]] = set()

    def shape_of(self, names: tuple[str, ...]) -> Shape | None:
        """The shape of rows with these columns and no other."""
        if names not in self._shapes:
            self._shapes[names] = recognised(names, self._columns)
        return self._shapes[names]

    def of(self, source: Source, rows: Rows) -> Validated:
        """Validate these rows, which all come from this source."""
        columns: Counter[tuple[str, ...]] = Counter()
        known, self._unread = len(self._shown), Counter()
        judged: dict[int, Judged] = {}
        simple: dict[int, Row] = {}
        for place, value in enumerate(rows.values):
            if isinstance(value, dict):
                names = tuple(value) + rows.unread_columns
                columns[names] += 1
                if (record := self._simple(names, value)) is not None:
                    simple[place] = record
                    continue
            judged[place] = self._judged(source, rows.row(place))
        taken = self._plain(source, simple)
        for place in taken.places if taken else ():
            self._unread.update(unread_keys(simple[place]))
        for place in simple.keys() - (taken.places if taken else ()):
            judged[place] = self._judged(source, rows.row(place))
        in_order = [(place, judged[place]) for place in sorted(judged)]
        return Validated(
            _merged(taken, {place: each for place, each in in_order if isinstance(each, KeyedRecord)}),
            [each for _, each in in_order if isinstance(each, Reject)],
            sum(each == "withheld" for each in judged.values()),
            sum(each == "erased" for each in judged.values()),
            columns,
            self._unread,
            *self._screen.taken(),
            [*self._shown.items()][known:],
        )

    def _plain(self, source: Source, rows: Mapping[int, Row]) -> Plain | None:
        """The plain rows among these, without erased records; None where none is left."""
        taken = plain(rows, self._group, source.entry, self._screen.changes)
        if taken is None or not self._erased:
            return taken
        has, batch = self._erased.has, taken.batch
        ids = zip(batch["id"].to_pylist(), batch["named"].to_pylist(), batch["content"].to_pylist(), strict=True)
        is_erased = [has(name) or (not named and has(content.hex())) for name, named, content in ids]
        kept = {place: rows[place] for place, gone in zip(taken.places, is_erased, strict=True) if not gone}
        return plain(kept, self._group, source.entry, self._screen.changes) if any(is_erased) else taken

    def _simple(self, names: tuple[str, ...], row: Row) -> Row | None:
        """The row with a record's columns, which may be plain; None where it has to be validated by itself."""
        if names in self._as_they_are:
            return row
        shape = self.shape_of(names)
        if shape is None or shape.name not in self._shown:
            return None
        if is_record(shape, self._columns):
            self._as_they_are.add(names)
        try:
            return as_record(row, shape, self._columns, group=self._group)
        except DataError:
            return None

    def _judged(self, source: Source, row: SourceRow) -> Judged:
        """Validate one row by itself."""
        screen, erased = self._screen, self._erased
        row_id = _id_of(row.value, self._columns) if erased else None
        if row_id is not None and erased.has(row_id):
            return "erased"
        screen.begin()
        value, shape = row.value, None
        try:
            if isinstance(value, Unreadable):
                raise DataError(value.reason)
            if isinstance(value, dict):
                shape = self.shape_of(tuple(value) + row.unread_columns)
                value = as_record(value, shape, self._columns, group=self._group)
                self._unread.update(unread_keys(value))
            record = self._validated(value, source=source.entry)
        except DataError as exc:
            kept = screen.kept(_text_of(row)) if row_id is not None or not erased else _OF_NOBODY_KNOWN
            return Reject(source.name, row.line, str(exc), kept)
        if erased and any(map(erased.has, ids_of(record))):
            return "erased"
        if not screen.end():
            return "withheld"
        if shape and shape.name not in self._shown:
            self._shown[shape.name] = _described(source, row, screen.kept(_text_of(row)), shape, record)
        return record


def _id_of(row: object, named: ColumnsConfig) -> str | None:
    """The row's own id, whatever else is wrong with it; None where it has none."""
    return named_id(row.get(named.id or "id")) if isinstance(row, Mapping) else None


def _merged(taken: Plain | None, judged: Mapping[int, KeyedRecord]) -> "pa.RecordBatch":
    """Both as one batch, in the order of their places."""
    import numpy as np
    import pyarrow as pa

    alone = keyed_batch_of(list(judged.values()))
    if taken is None:
        return alone
    if not judged:
        return taken.batch
    order = np.argsort([*taken.places, *judged])
    return pa.concat_batches([taken.batch, alone]).take(pa.array(order))


def _described(source: Source, row: SourceRow, row_text: str, shape: Shape, keyed: KeyedRecord) -> str:
    record = keyed.record
    asked = record.asked if isinstance(record.asked, str) else json.dumps(record.asked, ensure_ascii=False)
    return (
        f"{source.name}:{row.line} is read as {shape.name}: {row_text[:_MAX_SHOWN_CHARS]} becomes the prompt "
        f"{asked[:_MAX_SHOWN_CHARS]!r} and the answer {record.answer_text[:_MAX_SHOWN_CHARS]!r}"
    )


def _text_of(row: SourceRow) -> str:
    if row.raw is not None:
        # 4 bytes make one character at most: no need to decode more of a very long line.
        return row.raw[: 4 * _MAX_ROW_CHARS].decode(errors="replace").rstrip("\r\n")[:_MAX_ROW_CHARS]
    if isinstance(row.value, Unreadable):
        return ""
    try:
        return json.dumps(row.value, ensure_ascii=False, default=str)[:_MAX_ROW_CHARS]
    except RecursionError:  # nested almost too deeply to have been read
        return ""


# Reads and validates the rows of sources, in order: in this process, or wherever an engine runs it.


@dataclass(frozen=True)
class Rules:
    """The rules by which a row becomes a record. Each but `erased` is the key of `data` with the same name."""

    group: str = ""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    personal: Action = "report"
    phone_regions: tuple[str, ...] = ()
    personal_names: bool = False
    loss_on: LossOn = "last"
    erased: Erased = NONE_ERASED

    @classmethod
    def of(cls, data: DataConfig, erased: Erased = NONE_ERASED) -> "Rules":
        """The rules of a config, with the records that were erased."""
        regions = tuple(data.phone_regions)
        return cls(data.group, data.columns, data.personal, regions, data.personal_names, data.loss_on, erased)

    def validation(self) -> Validation:
        """The validation that applies these rules to rows.

        Raises:
            DataError: names are looked for, and presidio-analyzer is not installed.
        """
        screen = Screen(self.personal, regions=self.phone_regions, names=self.personal_names)
        erased, on = self.erased, self.loss_on
        return Validation(group=self.group, columns=self.columns, screen=screen, erased=erased, loss_on=on)


class Batch(NamedTuple):
    """Some rows of one source, in order."""

    place: int
    """The index of the source among all sources."""
    rows: int
    """How many rows were read."""
    validated: Validated


Reader = Callable[[Sequence[Source], Rules], Iterator[Batch]]
"""A function that validates every row of every source, and yields the results in order; it raises DataError where a
source cannot be opened, and StoreError where one in S3 cannot be read."""


def read_here(sources: Sequence[Source], rules: Rules) -> Iterator[Batch]:
    """The reader that runs in this process alone."""
    validation = rules.validation()
    with nothing_old_collected():
        for place, rows in rows_of(sources, rules):
            yield Batch(place, len(rows.lines), validation.of(sources[place], rows))


def rows_of(sources: Sequence[Source], rules: Rules) -> Iterator[tuple[int, Rows]]:
    """Yield all rows in batches, each with the index of its source."""
    wanted = partial(columns_read, named=rules.columns, group=rules.group)
    for place, (source, path) in enumerate(local_copies(sources)):
        for rows in read_rows(source.name, path, wanted=wanted):
            yield place, rows


@contextlib.contextmanager
def nothing_old_collected() -> Iterator[None]:
    """Exclude all existing objects from garbage collection. Libraries have a million of them, and Python would go
    through all after every few batches: a third of the reading time, although rows have no reference cycles."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
