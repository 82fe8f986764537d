"""Turns plain rows into records, a batch at once: with the same result as `validate`, in a tenth of the time.

A row is plain when it holds nothing but texts from system, user and assistant, in NFC, with no hint of personal data.
`validate` decides on all other rows, and on all that are wrong.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from components.prepare.arrow_records import keyed_batch
from components.prepare.dataset import WEIGHT, Message
from components.prepare.validate import ID_DIGITS, MAX_NAME_CHARS, MAX_TEXT_CHARS, ROLES, canonical_turn, hashed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

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
    names = [_name(row.get("id")) for row in rows.values()]
    groups = [_name(row.get(group)) or None for row in rows.values()] if group else [""] * len(rows)
    turns = [_turns(row) for row in rows.values()]
    may_be = [None not in each for each in zip(names, groups, turns, strict=True)]
    return _kept(may_be, list(rows), names, groups, turns)


def _kept(marks: Sequence[bool], *columns: Any) -> Any:
    return tuple(list(compress(column, marks)) for column in columns)


def _name(value: object) -> str | None:
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
