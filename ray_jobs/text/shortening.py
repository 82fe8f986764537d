"""Shortening prompts that do not fit, while keeping their form, which is the template's own text.

The oldest exchanges are removed first, each from one user's turn to the next. In the last exchange the longest text
that is no answer loses its beginning, since a question usually follows the text that it is about. The system message
comes last, and loses its end, since its rules come first.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from components.config.train import LossOn
from components.prepare.dataset import Record
from ray_jobs.text.chat_format import ChatFormat
from ray_jobs.text.pieces import read

Pieces = list[list[int]]
MOST_TRIES = 16
"""Maximum number of rounds. Each removes as many exchanges, or characters of one text, as on average hold the excess
tokens."""
KEPT_CHARS = 8
"""Minimum number of characters that are kept of a text that is cut."""
QUESTION_CHARS = 64
"""Number of characters of the other texts, enough for a question, that are kept while the system message has an end to
lose."""


def fitted(
    too_long: Sequence[tuple[Record, Pieces]], chat: ChatFormat, loss_on: LossOn, excess: Callable[[Pieces], int]
) -> list[tuple[Record, Pieces] | None]:
    """Each record, which has a single row, and its tokens after shortening its prompt until `excess` is at most 0.

    `excess` returns by how many tokens a row is too long. None for a record that cannot be shortened enough.
    """
    found: list[tuple[Record, Pieces] | None] = [None] * len(too_long)
    pending = dict(enumerate(too_long))
    for _ in range(MOST_TRIES):
        shorter = {place: each for place, row in pending.items() if (each := _shorter(*row, chat, excess)) is not None}
        rows = list(chat.rows_of(list(shorter.values()), loss_on))
        shorter = {place: each for (place, each), row in zip(shorter.items(), rows, strict=True) if len(row) == 1}
        texts = [row[0] for row in rows if len(row) == 1]
        if not texts:
            break
        pending = {}
        for (place, record), pieces in zip(shorter.items(), read(chat.tokenizer, texts), strict=True):
            if excess(pieces) > 0:
                pending[place] = record, pieces
            else:
                found[place] = record, pieces
    return found


def _shorter(record: Record, pieces: Pieces, chat: ChatFormat, excess: Callable[[Pieces], int]) -> Record | None:
    """The record without its oldest exchanges, or with one text shortened; None where neither is possible."""
    turns = record.prompt
    asked = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if len(asked) > 1:
        of_a_token = sum(len(turn.content) for turn in turns) / sum(map(len, pieces[:-1]))
        ends = itertools.accumulate(len(turn.content) for turn in turns[asked[0] :])
        before = dict(zip(range(asked[0] + 1, len(turns) + 1), ends, strict=True))
        enough = (place for place in asked[1:] if before[place] >= of_a_token * excess(pieces))
        return replace(record, prompt=[*turns[: asked[0]], *turns[next(enough, asked[-1]) :]])
    longest = sorted(range(len(turns)), key=lambda place: len(turns[place].content), reverse=True)
    systems = [(place, KEPT_CHARS) for place in longest if turns[place].role == "system"]
    others = [place for place in longest if turns[place].role not in ("system", "assistant")]
    ways = [*((place, QUESTION_CHARS) for place in others), *systems, *((place, KEPT_CHARS) for place in others)]
    way = next((way for way in ways if len(turns[way[0]].content) > way[1]), None)
    if way is None:
        return None
    (place, kept), text = way, turns[way[0]].content
    num_tokens = len(chat.tokenizer(text, add_special_tokens=False)["input_ids"])
    cut = min(len(text) - kept, math.ceil(len(text) * excess(pieces) / max(1, num_tokens)))
    left = text[:-cut] if turns[place].role == "system" else text[cut:]
    return replace(record, prompt=[*turns[:place], turns[place]._replace(content=left), *turns[place + 1 :]])
