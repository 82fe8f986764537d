"""One row in, one normalised record or one clear reason out. Every source passes through here, the example too.

A row is an object in one of two forms, each with an optional `id` and other columns that are ignored:

    {"prompt": "ICD-10 chapter: Mpox", "completion": "Infections"}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

`prompt` and `completion` may be lists of messages (TRL's conversational form), and lists may be JSON text. `tools`,
tool_calls and results are as chat templates read them. An assistant's message with weight 0 (OpenAI's) is context, and
not an answer to learn.
"""

import contextlib
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple, cast

import pyarrow as pa

from components.config.train import ColumnsConfig, DataConfig, LossOn
from components.prepare import traces
from components.prepare.dataset import OF_LOG, WEIGHT, Hashes, Message, Record, Reject, Role, batch_of, keyed_batch
from components.prepare.feedback import LEARNED, Key, Use, Verdict, learned
from components.prepare.personal import Kind, Screen
from components.prepare.rows import Rows, SourceRow, Unreadable
from components.prepare.shapes import SPEAKERS, TRACES, UNNAMED, Row, as_record, columns_read, recognised
from components.prepare.sources import Source, rows_of
from components.registry.between_runs import NONE_ERASED, Erased
from components.shared import garbage
from components.shared.errors import DataError

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
_MAX_ROW_CHARS = 2000
_OF_NOBODY_KNOWN = "[withheld: records were erased, and this row has no id that says it is none of them]"


def validate(row: object, *, group: str = "", source: str = "", loss_on: LossOn = "last") -> Record:
    """Turn one row into a record in NFC without trailing whitespace, with the id that the row gives, or an empty one.

    `group` is the column that names its group. With `loss_on` all, a conversation ends with the last answer that is to
    be learned. Raises DataError: the row is unusable; the message is the reason alone, without file and line.
    """
    if not isinstance(row, dict):
        raise DataError(f"row is {_kind(row)}: expected an object with {EXPECTED}")
    messages, prompt, completion = row.get("messages"), row.get("prompt"), row.get("completion")
    if messages is not None:
        if prompt is not None or completion is not None:
            raise DataError("row has messages and also prompt or completion: keep one form")
        turns, form = _messages(messages, "messages"), "messages"
        if turns[-1].role != "assistant":
            raise DataError(f"the last message is from {turns[-1].role!r}: expected assistant, who gives the answer")
    else:
        turns = _messages(prompt, "prompt") if isinstance(prompt, list) else [Message("user", _text(prompt, "prompt"))]
        turns, form = [*turns, _completion(completion)], "prompt"
    if turns[-1].more and not turns[-1].is_learned:
        learned = [place for place, turn in enumerate(turns) if turn.role == "assistant" and turn.is_learned]
        if not learned or loss_on == "last":
            advice = "; data.loss_on=all learns from the earlier ones" if learned else ""
            raise DataError(f"the answer has weight 0, so that nothing of the row would be learned{advice}")
        turns = turns[: learned[-1] + 1]
    answer = turns.pop()
    if "user" not in [turn.role for turn in turns]:
        raise DataError(f"{form} has no user message before the answer")
    belongs_to = _name(row.get(group), group) if group else ""
    tools = _tools(row["tools"]) if row.get("tools") is not None else ""
    calls = _json(json.loads(answer.more)["tool_calls"]) if answer.more else ""
    name = _name(row["id"], "id") if row.get("id") is not None else ""
    return Record(name, turns, answer.content, calls, tools, belongs_to, source)


def unread_keys(row: Mapping[str, Any]) -> set[str]:
    """The keys with a value in the row's messages that nothing is read from, as `messages[].KEY`."""
    unread = set[str]()
    if type(row.get("prompt")) is str and type(row.get("completion")) is str and row.get("messages") is None:
        return unread  # most rows, in a fraction of the time
    for column in ("messages", "prompt", "completion"):
        turns = row.get(column)
        if column == "messages" and isinstance(turns, str):
            with contextlib.suppress(ValueError, RecursionError):
                turns = json.loads(turns)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, Mapping) and len(turn) > 2:
                read = _READ_OF_ALL.union(_OF_A_RESULT if turn.get("role") == "tool" else ())
                unread |= {f"{column}[].{key}" for key in turn.keys() - read if turn[key] not in (None, "", [], {})}
    return unread


def _messages(messages: object, field: str) -> list[Message]:
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = _parsed(messages, field)
    if not isinstance(messages, list):
        raise DataError(f"{field} is {_kind(messages)}: expected a list of {{role, content}}")
    if not messages:
        raise DataError(f"{field} is an empty list")
    return [_plain(message) or _message(message, f"{field}[{index}]") for index, message in enumerate(messages)]


def _plain(message: Any) -> Message | None:
    """What `_message` returns, in a third of the time, for a message of a role and a text in ASCII; None for others."""
    if type(message) is not dict or len(message) != 2:
        return None
    role, text = message.get("role"), message.get("content")
    if type(text) is not str or type(role) is not str or role not in ROLES or not text.isascii():
        return None
    return Message(ROLES[role], stripped) if len(text) <= MAX_TEXT_CHARS and (stripped := text.rstrip()) else None


def _message(message: object, field: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{field} is {_kind(message)}: expected {{role, content}}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        is_role_known = "from" in message or str(role) in SPEAKERS
        advice = f"; data.columns.messages={field.partition('[')[0]} reads such turns" if is_role_known else ""
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
        function = _function(call, f"{field}[{index}]", "{function: {name, arguments}}")
        arguments = _parsed(function.get("arguments", {}), f"{field}[{index}].function.arguments")
        if not isinstance(arguments, Mapping):
            raise DataError(f"{field}[{index}].function.arguments is {_kind(arguments)}: expected an object")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        result.append({**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _tools(tools: object) -> str:
    listed = _list(tools, "tools")
    for index, tool in enumerate(listed):
        _function(tool, f"tools[{index}]", "{type, function: {name, parameters}}")
    return _json(listed) if listed else ""


def _function(value: Any, field: str, expected: str) -> Mapping[str, Any]:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{field} names no function: expected {expected}")
    return function


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


def _completion(completion: object) -> Message:
    if isinstance(completion, list):
        turns = _messages(completion, "completion")
        if len(turns) != 1 or turns[0].role != "assistant":
            raise DataError("completion has other messages than one from assistant")
        return turns[0]
    return Message("assistant", _text(completion, "completion"))


def _name(value: object, field: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{field} is {_kind(value)}{': expected text or a whole number' if value is not None else ''}")
    if value == "":
        raise DataError(f"{field} is empty: give it a value or leave it out")
    name = _encodable(str(value))
    if len(name) > MAX_NAME_CHARS:
        raise DataError(f"{field} has {len(name)} characters: expected at most {MAX_NAME_CHARS}")
    return name


def _text(value: object, field: str) -> str:
    if isinstance(value, str) and len(value) <= MAX_TEXT_CHARS and value.isascii() and (text := value.rstrip()):
        return text  # what is below does the same to it, in three times as long
    if not isinstance(value, str):
        raise DataError(f"{field} is {_kind(value)}{': expected text' if value is not None else ''}")
    if len(value) > MAX_TEXT_CHARS:
        raise DataError(f"{field} has {len(value)} characters: expected at most {MAX_TEXT_CHARS}")
    if not value.isascii() and not unicodedata.is_normalized("NFC", value):
        value = unicodedata.normalize("NFC", value)
    text = _encodable(value.rstrip())
    if not text:
        raise DataError(f"{field} is empty")
    return text


def _encodable(text: str) -> str:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"text is not valid Unicode: lone surrogate {exc.object[exc.start]!r}") from exc
    return text


def _value(value: object) -> str:
    return repr(value[:_MAX_VALUE_CHARS]) if isinstance(value, str) else _kind(value)


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    kinds: dict[Any, str] = {str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def canonical_prompt(turns: Sequence[tuple[str, str, str]]) -> str:
    """The prompt as one unambiguous string: equal exactly when the turns are equal."""
    return "".join(
        [f"{role}:{len(text)}:{text}" + (f"+{len(more)}:{more}" if more else "") for role, text, more in turns]
    )


def keyed(records: Sequence[Record]) -> pa.RecordBatch:
    """The records with the hashes that decide their split and their duplicates, as `keyed_batch` has them.

    Where a row gave no id, the id is the beginning of its content's hash.
    """
    hashes, sha256 = Hashes([], [], [], []), hashlib.sha256
    for record in records:
        turns, left = record.prompt, ""
        if unlearned := [place for place, turn in enumerate(turns) if turn.more and not turn.is_learned]:
            # They are part of the content, while the prompt stays the same.
            turns, left = [turn if turn.is_learned else _weightless(turn) for turn in turns], f"unlearned:{unlearned}"
        prompt, tools = canonical_prompt(turns), f"tools:{len(record.tools)}:{record.tools}" if record.tools else ""
        sha = sha256(prompt.encode())
        hashes.turns.append(sha.digest())
        left += f"origin:{record.origin}" if record.origin else ""  # where feedback says more, the same words are new
        sha.update(f"{tools}{left}answer:{record.answer}{f'calls:{record.calls}' if record.calls else ''}".encode())
        hashes.content.append(sha.digest())
        key = sha256((f"id:{record.id}" if record.id else f"prompt:{prompt}{tools}").encode()).digest()
        hashes.key.append(key)
        hashes.place.append(sha256(f"group:{record.group}".encode()).digest() if record.group else key)
    ids = [record.id or content.hex()[:ID_DIGITS] for record, content in zip(records, hashes.content, strict=True)]
    return keyed_batch(batch_of(records, ids=ids), hashes, [bool(record.id) for record in records])


def _weightless(turn: Message) -> Message:
    more = {key: value for key, value in json.loads(turn.more).items() if key != WEIGHT}
    return turn._replace(more=_json(more) if more else "")


# Validates the rows of one source, a batch at a time.


@dataclass
class Counts:
    """What some rows are, counted."""

    rows: int = 0
    rejected: int = 0
    withheld: int = 0
    """Records that hold personal data, where data.personal leaves them out."""
    erased: int = 0
    """Rows of erased records, usable or not."""
    with_personal: int = 0
    """Usable records that hold any personal data."""
    personal: Counter[Kind] = field(default_factory=Counter)
    """Pieces of personal data in them."""
    logged: Counter[tuple[str, Use]] = field(default_factory=Counter)
    """Logged answers by who served them, and by what becomes of them."""
    judged: Counter[Key] = field(default_factory=Counter)
    """Logged answers by the feedback that is on them."""
    columns: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Rows by the names of all their columns."""
    unread: Counter[str] = field(default_factory=Counter)
    """Rows by the keys of their messages that nothing is read from, as `unread_keys` names them."""

    @property
    def unused(self) -> Counter[Use]:
        """Logged answers that nobody rated good and nobody put right, by why."""
        uses = Counter[Use]()
        for (_, use), count in self.logged.items():
            uses[use] += 0 if use in LEARNED else count
        return +uses

    @property
    def accepted(self) -> int:
        return self.rows - self.rejected - self.withheld - self.erased - self.unused.total()

    def add(self, others: "Counts") -> None:
        for name, value in vars(others).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)


class Validated(NamedTuple):
    """The result of validating some rows."""

    batch: pa.RecordBatch
    """The records that may be used, in order, with the columns of `keyed_batch`."""
    rejects: list[Reject]
    counts: Counts


class Validation:
    """Turns rows into records."""

    def __init__(self, rules: "Rules") -> None:
        """Raises DataError: names are looked for, and presidio-analyzer is not installed."""
        self._rules, data = rules, rules.data
        self._screen = Screen(data.personal, regions=data.phone_regions, names=data.personal_names)
        self._shape_of = cache(partial(recognised, named=data.columns))

    def of(self, source: Source, rows: Rows) -> Validated:
        data, erased, counts = self._rules.data, self._rules.erased, Counts(len(rows.rows))
        named = UNNAMED if data.columns == UNNAMED else data.columns  # which no row has to compare again
        records: dict[int, Record] = {}
        rejects: list[Reject] = []
        for place, row in enumerate(rows.rows):
            value, shape = row.value, None
            if isinstance(value, dict):
                names = tuple(value) + rows.unread_columns
                counts.columns[names] += 1
                shape = self._shape_of(names)
            row_id = _id_of(value, data.columns) if erased else None
            is_users = shape is TRACES and bool(erased) and traces.user_of(cast(Row, value)) in erased
            if is_users or (row_id is not None and erased.has(row_id)):
                counts.erased += 1
                continue
            try:
                if isinstance(value, Unreadable):
                    raise DataError(value.reason)
                if isinstance(value, dict):
                    value = as_record(value, shape, named, group="" if shape is TRACES else data.group)
                    if unread := unread_keys(value):
                        counts.unread.update(unread)
                group, of_log = data.group, dict[str, Any]()
                if shape is TRACES:
                    value, use = self._learned(row.value, value, counts)
                    of_log = {name: _encodable(value[name]) for name in OF_LOG}
                    counts.logged[of_log["served_by"], use] += 1
                    if use not in LEARNED:
                        continue
                    group = "group" if value["group"] else ""
                record = validate(value, group=group, source=source.entry, loss_on=data.loss_on)
                records[place] = replace(record, **of_log) if of_log else record
            except DataError as exc:
                is_known = row_id is not None or not erased
                text = self._screen.kept(_text_of(row)) if is_known else _OF_NOBODY_KNOWN
                rejects.append(Reject(source.name, row.line, str(exc), text))
        personal = {}
        for place in self._screen.suspects(records):
            records[place], kinds = self._screen.record(records[place])
            if kinds:
                personal[place] = kinds
        batch = keyed([*records.values()])
        left_out = self._erased(batch, [*records])
        usable = [kinds for place, kinds in personal.items() if place not in left_out]
        counts.rejected, counts.with_personal = len(rejects), len(usable)
        counts.erased += len(left_out)
        counts.personal = sum(usable, counts.personal)
        if data.personal == "drop":
            counts.withheld = len(usable)
            left_out |= personal.keys()
        if left_out:
            batch = batch.filter(pa.array([place not in left_out for place in records]))
        return Validated(batch, rejects, counts)

    def _learned(self, row: Any, turn: Any, counts: Counts) -> tuple[dict[str, Any], Use]:
        """A logged answer with the feedback on it, which is counted: by the customer's own key, else the response's or
        the row's id."""

        def named(key: str) -> Any:
            return traces.first_of(row, key, f"metadata.{key}", f"request.metadata.{key}") if key else None

        verdicts, key, group = self._rules.feedback, self._rules.data.feedback_key, self._rules.data.group
        names = [(key, named(key)), ("", turn.get("response_id")), ("", turn.get("id"))]
        on_it = [answer_key for kind, name in names if (answer_key := (kind, str(name))) in verdicts]
        counts.judged.update(on_it)
        verdict = verdicts[on_it[0]] if on_it else None
        return learned(turn, verdict, self._rules.adapter, turn.get(group) or named(group))

    def _erased(self, batch: pa.RecordBatch, places: Sequence[int]) -> set[int]:
        """Which of the records at these places were erased, by the ids that they may have in a dataset."""
        if not self._rules.erased:
            return set()
        has = self._rules.erased.has
        ids = zip(places, *(batch[name].to_pylist() for name in ("id", "named", "content")), strict=True)
        return {place for place, name, named, content in ids if has(name) or (not named and has(content.hex()))}


def _id_of(row: object, named: ColumnsConfig) -> str | None:
    """The row's own id, whatever else is wrong with it; None where it has none, or an invalid one."""
    with contextlib.suppress(DataError):
        return _name(row.get(named.id or "id"), "id") if isinstance(row, Mapping) else None
    return None


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


class Rules(NamedTuple):
    """The rules by which a row becomes a record."""

    data: DataConfig = DataConfig(source=[])
    adapter: tuple[str, str] = ("", "")
    """Its name and alias, which a log's `model` may be and must not."""
    feedback: Mapping[Key, Verdict] = {}
    erased: Erased = NONE_ERASED

    def columns_read(self, columns: Collection[str]) -> set[str]:
        return columns_read(columns, self.data.columns, self.data.group, self.data.feedback_key)


Reader = Callable[[Sequence[Source], Rules], Iterator[tuple[int, Validated]]]
"""A function that validates every row of every source, and yields the results in order, each with the index of its
source; it raises DataError where a source cannot be opened, and StoreError where one in S3 cannot be read."""


def read_here(sources: Sequence[Source], rules: Rules) -> Iterator[tuple[int, Validated]]:
    """The reader that runs in this process alone."""
    validation = Validation(rules)
    with garbage.of_new_objects():
        for place, rows in rows_of(sources, rules.columns_read):
            yield place, validation.of(sources[place], rows)
