"""Whether an answer calls the right tool, parsed in the format in which the base's own chat template writes calls.

Most templates write JSON with the function's name and arguments under certain keys, which are found by rendering a call
with known contents. In any other format, an answer is right if it equals what the template writes.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

from components.prepare.dataset import Message, Record
from components.shared.errors import DataError
from ray_jobs.text.chat_format import ChatFormat

NAME, KEY, VALUE = "probe_function", "probe_argument", "probe value"
MOST_WRITTEN = 64
"""Limit of the ways of writing one call: the orders of its arguments, and the values that are right for each."""

Json = Any


@dataclass(frozen=True)
class Calls:
    """The format in which a chat template writes calls."""

    chat: ChatFormat
    name_key: str = ""
    """JSON key of the function's name; empty where calls are not written as JSON."""
    arguments_key: str = ""

    @classmethod
    def of(cls, chat: ChatFormat, tools: Mapping[str, Json]) -> "Calls | None":
        """Find the template's format; None where it takes no tools, or leaves out an answer's calls."""
        probe = Record("probe", [Message("user", "?")], "", _as_call(NAME, {KEY: VALUE}), offered(tools, [*tools][:1]))
        try:
            text = chat.rows(probe)[-1][-1]
        except DataError:
            return None
        if NAME not in text or VALUE not in text:
            return None
        for found in _objects(text):
            names = [key for key, value in found.items() if value == NAME]
            arguments = [key for key, value in found.items() if _arguments(value) == {KEY: VALUE}]
            if names and arguments:
                return cls(chat, names[0], arguments[0])
        return cls(chat)

    def is_right(self, answer: str, call: Mapping[str, Json]) -> bool:
        """Whether the answer makes this call and no other. `call` lists the right values of each argument."""
        if not self.name_key:
            return any(_tight(answer) == _tight(text) for text in self._written(call))
        made = [each for each in _objects(answer) if self.name_key in each]
        if len(made) != 1 or made[0][self.name_key] != call["name"]:
            return False
        arguments, right = _arguments(made[0].get(self.arguments_key)), call["arguments"]
        return (
            isinstance(arguments, dict)
            and arguments.keys() == right.keys()
            and all(any(_same(value, each) for each in right[key]) for key, value in arguments.items())
        )

    def _written(self, call: Mapping[str, Json]) -> Iterator[str]:
        """The texts that the template writes for this call, as text of an answer."""
        names = list(call["arguments"])
        ways = (
            (order, values) for order in permutations(names) for values in product(*map(call["arguments"].get, order))
        )
        for (order, values), _ in zip(ways, range(MOST_WRITTEN), strict=False):
            arguments = dict(zip(order, values, strict=True))
            tools = json.dumps([_tool(call["name"], {"parameters": {"type": "object", "properties": {}}})])
            record = Record("call", [Message("user", "?")], "", _as_call(call["name"], arguments), tools)
            tokens = self.chat.tokenizer(self.chat.rows(record)[-1][-1], add_special_tokens=False)["input_ids"]
            yield self.chat.text_of(tokens)


def offered(tools: Mapping[str, Json], names: Sequence[str]) -> str:
    """The tools of these names, as the JSON of a record's tools."""
    return json.dumps([_tool(name, tools[name]) for name in names])


def _tool(name: str, tool: Mapping[str, Json]) -> Json:
    return {"type": "function", "function": {"name": name, **tool}}


def _as_call(name: str, arguments: Mapping[str, Json]) -> str:
    return json.dumps([{"type": "function", "id": "call00000", "function": {"name": name, "arguments": arguments}}])


def _objects(text: str) -> Iterator[dict[str, Json]]:
    """The JSON objects in a text, one after the other, whatever surrounds them."""
    decoder, place = json.JSONDecoder(), 0
    while (start := text.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            place = start + 1
            continue
        if isinstance(value, dict):
            yield value


def _arguments(value: Json) -> Json:
    """Arguments as an object, parsed where a template writes them as a JSON string."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value


def _same(value: Json, right: Json) -> bool:
    if isinstance(value, str) and isinstance(right, str):
        return value.strip().casefold() == right.casefold()
    return value == right and isinstance(value, bool) == isinstance(right, bool)


def _tight(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
