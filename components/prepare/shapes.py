"""Recognises the shape of a row, and converts the row to prompt and completion or to messages; pure.

A shape is recognised by a row's columns, or given by data.columns. It only moves texts to where `validate` looks for
them; `validate` then judges whether they are valid.
"""

import difflib
import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from components.config.train import ColumnsConfig
from components.prepare import traces
from components.shared.errors import DataError
from components.shared.protocol import counted

Row = Mapping[str, Any]

KNOWN_COLUMNS = ("id", "prompt", "completion", "messages", "tools")
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""The names of the roles in other formats."""

EXPECTED = (
    "prompt and completion, or messages (a list of {role, content} that ends with the assistant's answer), or "
    "instruction and output (Alpaca), conversations (ShareGPT), question and answer"
)
PAIRS = (
    ("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("input", "output"),
    ("query", "response"), ("user", "assistant"),
)  # fmt: skip
"""Columns of prompt and answer, in any case of letters. Of several pairs in a row only the first of these is read."""
_PROMPTS = (
    "prompt", "question", "instruction", "input", "query", "problem", "request", "text", "body", "description",
    "message", "sentence", "subject", "title",
)  # fmt: skip
_HEADINGS = ("subject", "title")
"""Columns that go before a text's own."""
_ANSWERS = (
    "completion", "answer", "output", "response", "chosen", "solution", "reply", "target", "label", "category", "class",
    "summary",
)  # fmt: skip


class Shape(NamedTuple):
    """A format of rows."""

    name: str
    columns: tuple[str, ...]
    """The columns that are read, beside those that every shape may have."""
    convert: Callable[[Row], dict[str, Any]]
    """The row's texts as prompt and completion, or as messages."""


def recognised(columns: Collection[str], named: ColumnsConfig) -> Shape | None:
    """The shape of rows with these columns; None where it is unknown."""
    if named.messages or named.completion or named.prompt:
        return _as_named(columns, named)
    if traces.are_traces(columns):
        return TRACES
    if "messages" in columns:
        return MESSAGES
    if "prompt" in columns and "completion" in columns:
        return PLAIN
    if "instruction" in columns and "output" in columns:
        return ALPACA
    if "conversations" in columns:
        return SHARE_GPT
    pairs = [(_first(columns, [prompt]), _first(columns, [answer])) for prompt, answer in PAIRS]
    named_pairs = [(prompt, answer) for prompt, answer in pairs if prompt and answer]
    if named_pairs and (len(named_pairs) == 1 or named_pairs[0] == PAIRS[0]):
        prompt, answer = named_pairs[0]
        return Shape(f"{prompt} and {answer}", (prompt, answer), _joined([prompt], answer))
    if not named_pairs:
        return next((shape for shape in _LAST if {shape.columns[0], shape.columns[-1]} <= set(columns)), None)
    return None


def as_record(row: Row, shape: Shape | None, named: ColumnsConfig, *, group: str = "") -> Row:
    """The row with the columns that `validate` reads. Raises DataError: a text is missing, or a turn of a conversation
    is from an unknown speaker."""
    is_plain = shape is None or shape is PLAIN or shape is MESSAGES
    if is_plain and (named is UNNAMED or named == UNNAMED):
        return row
    record = {**(row if is_plain else {}), **(shape.convert(row) if shape else {})}
    kept = {"id": named.id or "id", "tools": named.tools or "tools", group: group}
    record |= {name: row[column] for name, column in kept.items() if column and column in row}
    return _with_system(record, row.get(named.system or "system")) if named.system or shape in _WITH_SYSTEM else record


def columns_read(columns: Collection[str], named: ColumnsConfig, *others: str) -> set[str]:
    """The columns that are needed, for rows with these columns; `others` is what data.group and the like name."""
    shape = recognised(columns, named)
    read = {*KNOWN_COLUMNS, *others, named.id, named.tools, named.system}
    return (read | set(shape.columns) if shape else read) & set(columns)


def advice(columns: Collection[str], named: ColumnsConfig) -> str:
    """The advice for rows whose shape is unknown."""
    if named != UNNAMED:
        named_columns = ", ".join(f"{key} = {value!r}" for key, value in named.model_dump().items() if value)
        meant = "".join(map(partial(did_you_mean, columns=tuple(columns)), _names(named)))
        return f"No row has the columns that data.columns names: {named_columns}{meant}"
    if {"chosen", "rejected"} <= set(columns):
        return "Of preference pairs the better answer can be trained on: set data.columns.completion=chosen"
    prompt, answer = _first(columns, _PROMPTS), _first(columns, _ANSWERS)
    if answer is None and prompt in ("text", "body", "sentence") and len(columns) == 1:
        return f"A column {prompt!r} alone does not say which part is the answer: write prompt and completion apart"
    keys = {"prompt": prompt or "COLUMN", "completion": answer or "COLUMN"}
    options = " ".join(f"--set {shlex.quote(f'data.columns.{key}={value}')}" for key, value in keys.items())
    return f"Or say which column is which: {options}"


def _names(named: ColumnsConfig) -> list[str]:
    """The columns that data.columns names."""
    prompts = [named.prompt] if isinstance(named.prompt, str) else named.prompt
    return [*filter(None, (*prompts, named.completion, named.messages))]


@cache  # as many rows may lack it
def did_you_mean(name: str, columns: tuple[str, ...]) -> str:
    """The question to append where a column of this name is missed; empty where it is there, or none is like it."""
    near = [] if name in columns else difflib.get_close_matches(name, columns, n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def guessed(columns: Collection[str]) -> tuple[list[str], str]:
    """The columns that make up the prompt, and that of the answer, by their names alone; empty where none says so."""
    prompt, heading = _first(columns, _PROMPTS), _first(columns, _HEADINGS)
    return list(dict.fromkeys(filter(None, (heading, prompt)))) if prompt else [], _first(columns, _ANSWERS) or ""


def unread_text(unread: Mapping[str, int]) -> str:
    """Name the columns that nothing is read from, by the number of rows with each, and what reads them."""
    shown = [f"{name} ({counted(rows, 'row')})" for name, rows in unread.items()]
    more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
    text = f"columns not read: {', '.join(shown[:10])}{more}"
    if any(name.endswith("[].reasoning_content") for name in unread):
        text += ". To train on reasoning, write it before the answer as <think>...</think>, and set model.thinking=true"
    return f"{text}. data.columns.prompt takes a list of columns that make up the prompt, data.columns.system one more"


def _first(columns: Collection[str], names: Sequence[str]) -> str | None:
    return next((column for name in names for column in columns if column.lower() == name), None)


def _as_named(columns: Collection[str], named: ColumnsConfig) -> Shape | None:
    if named.messages:
        shape = Shape("data.columns", (named.messages,), _conversation(named.messages))
    else:
        names = [named.prompt] if isinstance(named.prompt, str) else named.prompt
        prompts = tuple(filter(None, names)) or ("prompt",)
        answer = named.completion or "completion"
        shape = Shape("data.columns", (*prompts, answer), _joined(prompts, answer))
    return shape if set(shape.columns) & set(columns) else None


def _joined(prompts: Sequence[str], answer: str) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        for needed in (prompts[0], answer):
            if row.get(needed) is None:
                raise DataError(f"{needed} is missing{did_you_mean(needed, tuple(row))}")
        texts = [_text(row.get(column)) for column in prompts]
        if len(texts) > 1:
            texts = [text for text in texts if text is not None and text != ""]
        if len(texts) > 1 and all(isinstance(text, str) for text in texts):
            texts = ["\n\n".join(texts)]
        return {"prompt": texts[0] if texts else "", "completion": _text(row.get(answer))}

    return convert


def _text(value: Any) -> Any:
    """The value, a whole number as text: labels are often numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _alpaca(row: Row) -> dict[str, Any]:
    record = _joined(["instruction", "input"], "output")(row)
    if not row.get("history"):
        return record
    earlier = [
        {"role": role, "content": text}
        for turn in row["history"]
        for role, text in zip(("user", "assistant"), turn, strict=False)
    ]
    return {**record, "prompt": [*earlier, {"role": "user", "content": record["prompt"]}]}


def _conversation(column: str) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        turns = row.get(column)
        if isinstance(turns, str) and turns.lstrip().startswith("["):  # as in a cell of CSV
            try:
                turns = json.loads(turns)
            except (ValueError, RecursionError) as exc:
                raise DataError(f"{column} is text that is not JSON: {exc}") from exc
        if not isinstance(turns, list):
            return {"messages": turns}
        return {"messages": [_turn(turn, f"{column}[{place}]") for place, turn in enumerate(turns)]}

    return convert


def _turn(turn: Any, field: str) -> Any:
    if not isinstance(turn, Mapping) or ("from" not in turn and "role" not in turn):
        return turn
    if "role" in turn:
        return {**turn, "role": SPEAKERS.get(str(turn["role"]), turn["role"])}
    speaker = turn["from"]
    if speaker not in SPEAKERS:
        raise DataError(f"{field}.from is {str(speaker)[:40]!r}: expected {', '.join(SPEAKERS)}")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**others, "role": SPEAKERS[speaker], "content": turn.get("value")}


def _with_system(record: dict[str, Any], system: Any) -> dict[str, Any]:
    if system in (None, ""):
        return record
    first = {"role": "system", "content": system}
    if record.get("messages") is not None:
        turns = record["messages"]
        return {**record, "messages": [first, *turns] if isinstance(turns, list) else turns}
    prompt = record.get("prompt")
    return {
        **record,
        "prompt": [first, *prompt] if isinstance(prompt, list) else [first, {"role": "user", "content": prompt}],
    }


UNNAMED = ColumnsConfig()
PLAIN = Shape("prompt and completion", ("prompt", "completion"), dict)
MESSAGES = Shape("messages", ("messages",), dict)
ALPACA = Shape("Alpaca", ("instruction", "input", "output", "system", "history"), _alpaca)
TRACES = Shape("logged requests", traces.COLUMNS, traces.as_turn)
_LAST = (
    Shape("Dolly", ("instruction", "context", "response"), _joined(["instruction", "context"], "response")),
    Shape(
        "instruction and answer", ("instruction", "context", "answer"), _joined(["instruction", "context"], "answer")
    ),
    Shape("problem and solution", ("problem", "solution"), _joined(["problem"], "solution")),
)
"""What rows are in whose columns are those of no other shape."""
SHARE_GPT = Shape("ShareGPT", ("conversations", "system"), _conversation("conversations"))
_WITH_SYSTEM = (ALPACA, SHARE_GPT)
