"""The tokens of texts in pieces: prompt and answer, alternating, each as generation will see it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

CHARACTERS_AT_ONCE = 2**20  # of rows that are encoded together: an encoding takes 100 B for each token


def read(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """The tokens of each piece of each row, as the piece follows those before it: shapes [rows][pieces][tokens].

    Alone a text may read otherwise: a SentencePiece tokenizer begins it with a space that is not there. Only where two
    pieces merge over their border is the second read alone, since generation will see the first one's tokens.
    """
    sizes = np.cumsum([sum(map(len, row)) for row in rows])
    parts = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(sizes // CHARACTERS_AT_ONCE)) + 1)
    return [pieces for part in parts for pieces in _read_whole(tokenizer, [rows[row] for row in part])]


def _read_whole(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """The same of rows that are read together, each of them once where its borders allow that.

    A tokenizer splits a text at its added tokens first, and reads what lies between by itself. So the beginning of a
    row up to a border reads as in the whole row wherever its tail, from the last added token on, does.
    """
    encodings = _encode(tokenizer, ["".join(row) for row in rows]).encodings or [] if rows else []
    added = frozenset(tokenizer.added_tokens_decoder)
    found = [_borders(row, encoding, added) for row, encoding in zip(rows, encodings, strict=False)]
    tails = list(dict.fromkeys(border.tail for borders in found for border in borders or ()))
    reads = dict(zip(tails, _encode(tokenizer, tails)["input_ids"], strict=True)) if tails else {}
    result: list[list[list[int]] | None] = [None] * len(rows)
    for place, borders in enumerate(found):
        ids = encodings[place].ids
        if borders is not None and all(ids[each.start : each.end] == reads[each.tail] for each in borders):
            result[place] = [ids[a:b] for a, b in pairwise([0, *(each.end for each in borders), len(ids)])]
    rest = iter(_read_from_beginnings(tokenizer, [row for row, pieces in zip(rows, result, strict=True) if not pieces]))
    return [pieces or next(rest) for pieces in result]


class _Border(NamedTuple):
    """Where a piece of a row ends."""

    start: int
    """The last added token before it."""
    end: int
    """The first token behind it."""
    tail: str
    """The text between the two."""


def _borders(row: Sequence[str], encoding: Any, added: frozenset[int]) -> list[_Border] | None:
    """None where they do not lie between two tokens."""
    text, ids, found, end = "".join(row), encoding.ids, [], 0
    for piece in row[:-1]:
        end += len(piece)
        # A tokenizer of bytes counts the spaces before a word to it, and leaves them out of where it says the word is.
        behind = encoding.char_to_token(len(text) - len(text[end:].lstrip(" ")))
        if not behind:
            return None
        start = next((place for place in range(behind - 1, 0, -1) if ids[place] in added), 0)
        found.append(_Border(start, behind, text[encoding.token_to_chars(start)[0] if start else 0 : end]))
    return found


def _read_from_beginnings(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    beginnings = ["".join(row[: end + 1]) for row in rows for end in range(len(row))]
    read = iter(_encode(tokenizer, beginnings)["input_ids"] if beginnings else [])
    result = []
    for row in rows:
        pieces: list[list[int]] = []
        known: list[int] = []
        for piece in row:
            whole = next(read)
            is_known = whole[: len(known)] == known
            tokens = whole[len(known) :] if is_known else _encode(tokenizer, [piece])["input_ids"][0]
            pieces.append(tokens)
            known = known + tokens
        result.append(pieces)
    return result


def _encode(tokenizer: Any, texts: list[str]) -> Any:
    # The template has written every special token that belongs there, a beginning-of-sequence token included.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
