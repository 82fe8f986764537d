"""From records to batches of tokens.

Shapes: N records, B records of a batch, T tokens of its longest record.

A record becomes `prompt tokens + answer tokens`, both from the base's own chat template; only answers are labelled.
Rows are padded on the right, so a causal model needs no attention mask: no real token ever looks at padding.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from components.config.train import LossOn
from components.prepare.dataset import Record
from ray_jobs.text.chat_format import ChatFormat

if TYPE_CHECKING:
    import torch


CHARACTERS_AT_ONCE = 2**20  # of rows tokenised together: an encoding takes 100 B per token


def read_pieces(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """Tokenise each piece of each row after the pieces before it: shapes [rows][pieces][tokens]. Only where two pieces
    merge across their border is the second tokenised alone, since generation will see the tokens of the first."""
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
    borders = [_borders(row, encoding, added) for row, encoding in zip(rows, encodings, strict=False)]
    tails = list(dict.fromkeys(tail for of_row in borders for _, _, tail in of_row or ()))
    reads = dict(zip(tails, _encode(tokenizer, tails)["input_ids"], strict=True)) if tails else {}
    result: list[list[list[int]] | None] = [None] * len(rows)
    for place, of_row in enumerate(borders):
        ids = encodings[place].ids
        if of_row is not None and all(ids[start:end] == reads[tail] for start, end, tail in of_row):
            result[place] = [ids[a:b] for a, b in pairwise([0, *(end for _, end, _ in of_row), len(ids)])]
    rest = iter(_read_from_beginnings(tokenizer, [row for row, pieces in zip(rows, result, strict=True) if not pieces]))
    return [pieces or next(rest) for pieces in result]


def _borders(row: Sequence[str], encoding: Any, added: frozenset[int]) -> list[tuple[int, int, str]] | None:
    """The borders between a row's pieces: the index of the last added token before each, or 0, the index of the first
    token after it, and the text between the two. None where a border does not lie between two tokens."""
    text, ids, borders, end = "".join(row), encoding.ids, [], 0
    for piece in row[:-1]:
        end += len(piece)
        # A byte-level tokenizer makes spaces before a word part of its token, but excludes them from its offsets.
        behind = encoding.char_to_token(len(text) - len(text[end:].lstrip(" ")))
        if not behind:
            return None
        start = next((place for place in range(behind - 1, 0, -1) if ids[place] in added), 0)
        borders.append((start, behind, text[encoding.token_to_chars(start)[0] if start else 0 : end]))
    return borders


def _read_from_beginnings(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    beginnings = ["".join(row[: end + 1]) for row in rows for end in range(len(row))]
    read = iter(_encode(tokenizer, beginnings)["input_ids"] if beginnings else [])
    result = []
    for row in rows:
        pieces: list[list[int]] = []
        before: list[int] = []
        for piece in row:
            whole = next(read)
            goes_on = whole[: len(before)] == before
            tokens = whole[len(before) :] if goes_on else _encode(tokenizer, [piece])["input_ids"][0]
            pieces.append(tokens)
            before = before + tokens
        result.append(pieces)
    return result


def _encode(tokenizer: Any, texts: list[str]) -> Any:
    # The template has already written all special tokens, including a beginning-of-sequence token.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)


# Shortening prompts that do not fit, while keeping their form, which is the template's own text.
#
# The oldest exchanges are removed first, each from one user's turn to the next. In the last exchange the longest text
# that is no answer loses its beginning, since a question usually follows the text that it is about. The system message
# comes last, and loses its end, since its rules come first.

Pieces = list[list[int]]
MOST_TRIES = 16
"""Rounds, of which each removes as many exchanges, or characters of one text, as on average hold the excess tokens."""
KEPT_CHARS, QUESTION_CHARS = 8, 64
"""Characters that are kept of a text that is cut; of other texts, while the system message has an end to lose."""


def fitted(
    too_long: Sequence[tuple[Record, Pieces]], chat: ChatFormat, loss_on: LossOn, excess: Callable[[Pieces], int]
) -> list[tuple[Record, Pieces] | None]:
    """Each record, which has a single row, and its tokens after shortening its prompt until `excess` is at most 0.

    `excess` returns by how many tokens a row is too long. None for a record that cannot be shortened enough.
    """
    shortened: list[tuple[Record, Pieces] | None] = [None] * len(too_long)
    pending = dict(enumerate(too_long))
    for _ in range(MOST_TRIES):
        shorter = {
            place: record for place, row in pending.items() if (record := _shorter(*row, chat, excess)) is not None
        }
        rows = [chat.rows(record, loss_on) for record in shorter.values()]
        shorter = {place: record for (place, record), row in zip(shorter.items(), rows, strict=True) if len(row) == 1}
        texts = [row[0] for row in rows if len(row) == 1]
        if not texts:
            break
        pending = {}
        for (place, record), pieces in zip(shorter.items(), read_pieces(chat.tokenizer, texts), strict=True):
            if excess(pieces) > 0:
                pending[place] = record, pieces
            else:
                shortened[place] = record, pieces
    return shortened


def _shorter(record: Record, pieces: Pieces, chat: ChatFormat, excess: Callable[[Pieces], int]) -> Record | None:
    """The record without its oldest exchanges, or with one text shortened; None where neither is possible."""
    turns = record.prompt
    questions = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if len(questions) > 1:
        of_a_token = sum(len(turn.content) for turn in turns) / sum(map(len, pieces[:-1]))
        ends = itertools.accumulate(len(turn.content) for turn in turns[questions[0] :])
        before = dict(zip(range(questions[0] + 1, len(turns) + 1), ends, strict=True))
        enough = (place for place in questions[1:] if before[place] >= of_a_token * excess(pieces))
        return replace(record, prompt=[*turns[: questions[0]], *turns[next(enough, questions[-1]) :]])
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


IGNORED = -100  # the label that cross_entropy ignores
NO_RECORD = -1  # an empty place in a worker's share of a batch
MIN_PROMPT_TOKENS = 8  # minimum that remains of a prompt that is cut to make room for its answer
AT_ONCE = 1000  # records tokenised together: a token in a Python list takes 25 times its memory in an array
MEGABATCH = 8  # batches sorted together by length: enough to group similar lengths, few enough to stay random


@dataclass(frozen=True)
class TokenizedSplit:
    """One split as flat arrays, which Ray's object store shares between processes without copying.

    N rows: one per record, or one per answer of a record where the chat template cannot render them all in one.
    """

    ids: Sequence[str]
    """Length N: the id of each row's record."""
    tokens: npt.NDArray[np.int32]
    """The tokens of all rows, concatenated."""
    labelled: npt.NDArray[np.bool_]
    """One flag per token: whether it is labelled, that is, contributes to the loss."""
    offsets: npt.NDArray[np.int64]
    """Length N + 1: row i is tokens[offsets[i]:offsets[i + 1]]."""
    num_prompt_tokens: npt.NDArray[np.int32]
    """Length N: the number of tokens of each row before its last answer."""
    too_long: Sequence[str]
    """Ids of the records whose answer leaves no room for a prompt, or contains a stop; they are not in the arrays."""
    cut: Sequence[str]
    """Ids of the records whose prompt was shortened."""
    cut_system: Sequence[str] = ()
    """Ids of those that lost part of their system message too, or all of it."""
    answers: npt.NDArray[np.int32] | None = None
    """Length N: the number of labelled tokens of each row; None where they have not been counted yet."""
    by_vllm: Sequence[str] | None = None
    """Length N: what vLLM answers to each prompt; None where it was not asked."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    @cached_property
    def num_answer_tokens(self) -> npt.NDArray[np.int64]:
        if self.answers is not None:
            return self.answers.astype(np.int64)
        return np.add.reduceat(self.labelled, self.offsets[:-1], dtype=np.int64) if len(self) else self.offsets[:0]

    @property
    def digest(self) -> str:
        return hashlib.sha256(
            b"".join(column.tobytes() for column in (self.offsets, self.tokens, self.labelled))
        ).hexdigest()

    def prompt(self, row: int) -> npt.NDArray[np.int32]:
        """The tokens before the row's last answer."""
        return self.tokens[self.offsets[row] : self.offsets[row] + self.num_prompt_tokens[row]]

    def answer(self, row: int) -> npt.NDArray[np.int32]:
        """The tokens of the row's last answer, its stop token included."""
        return self.tokens[self.offsets[row] + self.num_prompt_tokens[row] : self.offsets[row + 1]]

    def take(self, indices: Sequence[int]) -> "TokenizedSplit":
        rows = np.asarray(indices, dtype=np.int64)
        chosen = [slice(self.offsets[i], self.offsets[i + 1]) for i in indices]
        return replace(
            self,
            ids=[self.ids[i] for i in indices],
            tokens=np.concatenate([self.tokens[:0], *(self.tokens[span] for span in chosen)]),
            labelled=np.concatenate([self.labelled[:0], *(self.labelled[span] for span in chosen)]),
            offsets=_offsets([span.stop - span.start for span in chosen]),
            num_prompt_tokens=self.num_prompt_tokens[rows],
            answers=None if self.answers is None else self.answers[rows],
            by_vllm=None if self.by_vllm is None else [self.by_vllm[i] for i in indices],
        )


class Lengths(Protocol):
    """The number of tokens, and of labelled ones, of each of a split's rows."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]: ...
    @property
    def num_answer_tokens(self) -> npt.NDArray[np.int64]: ...


def tokenize(records: Sequence[Record], chat: ChatFormat, max_length: int, loss_on: LossOn = "last") -> TokenizedSplit:
    """Tokenise records with the base's chat template. Prompts that do not fit are shortened, see `fitted`; the last
    answer is never cut. Raises DataError: a record cannot be formatted with the base's chat template."""

    def excess(row: Sequence[Sequence[int]]) -> int:
        """Number of tokens by which a row, whose last piece is the answer, exceeds `max_length`."""
        return sum(map(len, row[:-1])) + len(_ended(list(row[-1]), chat)) - max_length

    ids, lengths, num_prompt_tokens = list[str](), list[int](), list[int]()
    too_long, cut, cut_system = list[str](), list[str](), list[str]()
    tokens, labelled = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.bool_)]
    for start in range(0, len(records), AT_ONCE):
        rows_of = [(record, chat.rows(record, loss_on)) for record in records[start : start + AT_ONCE]]
        owners = [(record, len(rows)) for record, rows in rows_of for _ in rows]
        read = read_pieces(chat.tokenizer, [row for _, rows in rows_of for row in rows])
        has_room = [
            max_length - len(_ended(row[-1], chat)) >= min(MIN_PROMPT_TOKENS, sum(map(len, row[:-1])))
            and not chat.ends_early(record, loss_on)
            for (record, _), row in zip(owners, read, strict=True)
        ]
        is_cut = [has and excess(row) > 0 for has, row in zip(has_room, read, strict=True)]
        # Records with one row per answer are not shortened: a shorter conversation would have other rows.
        alone = [place for place, (_, num_rows) in enumerate(owners) if is_cut[place] and num_rows == 1]
        shorter = fitted([(owners[place][0], read[place]) for place in alone], chat, loss_on, excess)
        for place, fitting in zip(alone, shorter, strict=True):
            if fitting is not None:
                left, read[place] = fitting
                cut_system += [left.id] if _systems(left) != _systems(owners[place][0]) else []
        rows, labels = [tokens[0]], [labelled[0]]
        for place, (record, _) in enumerate(owners):
            if not has_room[place]:
                too_long.append(record.id)
                continue
            *before, last = read[place]
            answer = _ended(last, chat)
            prompt = [token for piece in before for token in piece]
            lost = max(0, len(prompt) + len(answer) - max_length)  # tokens to cut where shortening did not suffice
            cut += [record.id] if is_cut[place] else []
            cut_system += [record.id] if lost and _systems(record) else []
            earlier = _earlier_answers(before, chat)[lost:]
            earlier &= ~np.logical_and.accumulate(earlier)  # the remainder of an answer that was cut is not labelled
            rows.append(np.array(prompt[lost:] + answer, dtype=np.int32))
            labels.append(np.concatenate([earlier, np.ones(len(answer), dtype=np.bool_)]))
            ids.append(record.id)
            lengths.append(len(rows[-1]))
            num_prompt_tokens.append(len(prompt) - lost)
        tokens.append(np.concatenate(rows))
        labelled.append(np.concatenate(labels))
    return TokenizedSplit(
        ids=ids,
        tokens=np.concatenate(tokens),
        labelled=np.concatenate(labelled),
        offsets=_offsets(lengths),
        num_prompt_tokens=np.array(num_prompt_tokens, dtype=np.int32),
        too_long=list(dict.fromkeys(too_long)),
        cut=list(dict.fromkeys(cut)),
        cut_system=list(dict.fromkeys(cut_system)),
    )


def as_split(
    rows: Sequence[Sequence[int] | npt.NDArray[np.int32]],
    num_prompt_tokens: Sequence[int],
    ids: Sequence[str] | None = None,
) -> TokenizedSplit:
    """A split of these rows of tokens, in which all tokens after the prompt are labelled, so the loss counts them."""
    starts = zip(rows, num_prompt_tokens, strict=True)
    return TokenizedSplit(
        ids=list(ids) if ids is not None else [str(index) for index in range(len(rows))],
        tokens=np.concatenate([np.zeros(0, np.int32), *(np.asarray(row, np.int32) for row in rows)]),
        labelled=np.concatenate([np.zeros(0, np.bool_), *(np.arange(len(row)) >= start for row, start in starts)]),
        offsets=_offsets([*map(len, rows)]),
        num_prompt_tokens=np.array(num_prompt_tokens, dtype=np.int32),
        too_long=[],
        cut=[],
    )


def _systems(record: Record) -> list[str]:
    return [turn.content for turn in record.prompt if turn.role == "system"]


def plan_epoch(
    lengths: npt.NDArray[np.int64], *, batch_size: int, group_by_length: bool = True, seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """The batches of one epoch, each an array of record indices. A pure function, so that resuming needs no state.

    Every record occurs once; a last short batch is filled with records from the epoch's start, so that every batch can
    be divided evenly. With `group_by_length`, each group of MEGABATCH shuffled batches is sorted by length and divided
    into batches again, and all batches are shuffled: lengths in a batch are similar, and it stays a near-random sample.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    order = np.concatenate([order, np.resize(order, -len(order) % batch_size)])
    if group_by_length:
        chunks = np.array_split(order, range(batch_size * MEGABATCH, len(order), batch_size * MEGABATCH))
        order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
    batches = list(order.reshape(-1, batch_size))
    rng.shuffle(batches)
    return batches


def share(
    batch: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    *,
    micro_batch_size: int,
    max_tokens: int = 0,
    num_workers: int,
) -> list[npt.NDArray[np.int64]]:
    """Divide a batch into rounds (micro-batches): for each round the records of each worker, shape (num_workers, B).

    Neighbours in length go to different workers, so that all do equal work in each round. With `max_tokens` a round has
    as many records of similar length as stay within it on each worker, padding included, and at least one; `lengths`
    are those of all records. Places are empty (`NO_RECORD`) where the records do not divide evenly among the workers.
    """
    if not max_tokens:
        whole = _filled(batch, micro_batch_size * num_workers)
        return list(whole.reshape(-1, micro_batch_size, num_workers).transpose(0, 2, 1))
    longest_first = batch[np.argsort(-lengths[batch], kind="stable")]
    longest_first = _filled(longest_first, num_workers).reshape(-1, num_workers)
    rounds, start = [], 0
    while start < len(longest_first):
        end = start + max(1, max_tokens // int(lengths[longest_first[start, 0]]))
        rounds.append(longest_first[start:end].T)
        start = end
    return rounds


def _filled(batch: npt.NDArray[np.int64], step: int) -> npt.NDArray[np.int64]:
    return np.pad(batch, (0, -len(batch) % step), constant_values=NO_RECORD)


def collate(
    split: TokenizedSplit, indices: Sequence[int] | npt.NDArray[np.int64], pad: int
) -> dict[str, "torch.Tensor"]:
    """Pad records on the right; returns `input_ids` and `labels`, both int64 (B, T). Labels are not shifted."""
    import torch

    width = int(max(split.lengths[i] for i in indices))
    input_ids = np.full((len(indices), width), pad, dtype=np.int64)
    labels = np.full((len(indices), width), IGNORED, dtype=np.int64)
    for row, index in enumerate(indices):
        start, end = split.offsets[index], split.offsets[index + 1]
        input_ids[row, : end - start] = split.tokens[start:end]
        labels[row, : end - start] = np.where(split.labelled[start:end], split.tokens[start:end], IGNORED)
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def common_beginning(rows: Sequence[npt.NDArray[Any]], most: int) -> int:
    """Length of the rows' common prefix, up to `most` tokens, which each row has."""
    equal = np.logical_and.reduce([row[:most] == rows[0][:most] for row in rows])
    return most if equal.all() else int(equal.argmin())


def by_length(lengths: npt.NDArray[np.int64], batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield indices in batches of similar length, longest first, so that memory runs out at once or never."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _offsets(lengths: "Sequence[int] | npt.NDArray[np.int64]") -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _ended(tokens: list[int], chat: ChatFormat) -> list[int]:
    """An answer's tokens up to and including the first stop, added where there is none: generation never sees what a
    template writes after it."""
    stop = _first_stop(tokens, chat)
    return [*tokens, chat.end_of_turn] if stop is None else tokens[: stop + 1]


def _first_stop(tokens: list[int], chat: ChatFormat) -> int | None:
    return next((place for place, token in enumerate(tokens) if token in chat.stops), None)


def _earlier_answers(pieces: Sequence[list[int]], chat: ChatFormat) -> npt.NDArray[np.bool_]:
    """One flag per token of a prompt in pieces: whether it belongs to an earlier answer. Every second piece is one, up
    to its stop."""
    flags = [np.zeros(len(tokens), dtype=np.bool_) for tokens in pieces]
    for tokens, labelled in zip(pieces[1::2], flags[1::2], strict=True):
        stop = _first_stop(tokens, chat)
        labelled[: len(tokens) if stop is None else stop + 1] = True
    return np.concatenate(flags)
