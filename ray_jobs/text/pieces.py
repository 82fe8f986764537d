"""Tokenising texts in pieces, prompt and answer in turn, with each piece's tokens as generation will see them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

CHARACTERS_AT_ONCE = 2**20  # of rows tokenised together: an encoding takes 100 B per token


def read(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """Tokenise each piece of each row in its context, after the pieces before it: shapes [rows][pieces][tokens].

    A text alone may have other tokens: a SentencePiece tokenizer adds a space in front. Only where two pieces merge
    across their border is the second tokenised alone, since generation will see the tokens of the first.
    """
    sizes = np.cumsum([sum(map(len, row)) for row in rows])
    parts = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(sizes // CHARACTERS_AT_ONCE)) + 1)
    return [pieces for part in parts for pieces in _read_whole(tokenizer, [rows[row] for row in part])]


def _read_whole(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """Tokenise rows as whole texts in one call, and split the tokens where the borders allow that.

    A tokenizer first splits a text at its added tokens, and tokenises the parts in between separately. So the beginning
    of a row up to a border has the same tokens as in the whole row if its tail, from the last added token on, has.
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
    """The end of a piece in a row."""

    start: int
    """Index of the last added token before the border; 0 where there is none."""
    end: int
    """Index of the first token after the border."""
    tail: str
    """Text from `start` up to the border."""


def _borders(row: Sequence[str], encoding: Any, added: frozenset[int]) -> list[_Border] | None:
    """The borders between a row's pieces; None where one does not lie between two tokens."""
    text, ids, found, end = "".join(row), encoding.ids, [], 0
    for piece in row[:-1]:
        end += len(piece)
        # A byte-level tokenizer makes spaces before a word part of its token, but excludes them from its offsets.
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
    # The template has already written all special tokens, including a beginning-of-sequence token.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
