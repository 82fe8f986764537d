"""From records to batches of tokens.

Shapes: N records, B records of a batch, T tokens of its longest record.

A record becomes `prompt tokens + answer tokens`, both from the base's own chat template; only answers are labelled.
Rows are padded on the right, so a causal model needs no attention mask: no real token ever looks at padding.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from components.config.data import LossOn
from components.prepare.dataset import Record
from ray_jobs.text import pieces, shortening
from ray_jobs.text.chat_format import ChatFormat

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label that cross_entropy passes over
NO_RECORD = -1  # an empty place in a batch that is dealt out
MIN_PROMPT_TOKENS = 8  # what must remain of a prompt that is cut to make room for its answer
AT_ONCE = 1000  # records that are tokenised together: in Python's lists a token takes 25 times its room in an array
MEGABATCH = 8  # batches that are sorted together: enough to pair like lengths, few enough to stay random


@dataclass(frozen=True)
class TokenizedSplit:
    """One split as flat arrays, which Ray's object store shares between processes without copying.

    N rows: a record each, or one for each of its answers where the chat template cannot hold them in one.
    """

    ids: Sequence[str]
    tokens: npt.NDArray[np.int32]
    """All rows end to end."""
    labelled: npt.NDArray[np.bool_]
    """Of each token, whether it is to be learned."""
    offsets: npt.NDArray[np.int64]
    """Length N + 1: row i is tokens[offsets[i]:offsets[i + 1]]."""
    num_prompt_tokens: npt.NDArray[np.int32]
    """Length N: how many tokens of each row come before its last answer."""
    too_long: Sequence[str]
    """Ids of the records whose answer leaves no room for a prompt, or would end early; they are not in the arrays."""
    cut: Sequence[str]
    """Ids of the records whose prompt is not whole."""
    answers: npt.NDArray[np.int32] | None = None
    """Length N: the labelled tokens of each row, where they have been counted."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @cached_property
    def num_answer_tokens(self) -> npt.NDArray[np.int64]:
        """Labelled tokens of each row."""
        if self.answers is not None:
            return self.answers.astype(np.int64)
        return np.add.reduceat(self.labelled, self.offsets[:-1], dtype=np.int64) if len(self) else self.offsets[:0]

    @property
    def digest(self) -> str:
        """Of its tokens, and which of them are to be learned."""
        return hashlib.sha256(
            b"".join(each.tobytes() for each in (self.offsets, self.tokens, self.labelled))
        ).hexdigest()

    def prompt(self, row: int) -> npt.NDArray[np.int32]:
        """The tokens before the row's last answer."""
        return self.tokens[self.offsets[row] : self.offsets[row] + self.num_prompt_tokens[row]]

    def answer(self, row: int) -> npt.NDArray[np.int32]:
        """The tokens of the row's last answer, its end included."""
        return self.tokens[self.offsets[row] + self.num_prompt_tokens[row] : self.offsets[row + 1]]

    def take(self, indices: Sequence[int]) -> "TokenizedSplit":
        """The rows at `indices`, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        chosen = [slice(self.offsets[i], self.offsets[i + 1]) for i in indices]
        return TokenizedSplit(
            ids=[self.ids[i] for i in indices],
            tokens=np.concatenate([self.tokens[:0], *(self.tokens[each] for each in chosen)]),
            labelled=np.concatenate([self.labelled[:0], *(self.labelled[each] for each in chosen)]),
            offsets=_offsets([each.stop - each.start for each in chosen]),
            num_prompt_tokens=self.num_prompt_tokens[rows],
            answers=None if self.answers is None else self.answers[rows],
            too_long=self.too_long,
            cut=self.cut,
        )


class Lengths(Protocol):
    """What one plans a training with: as much of a split as needs none of its tokens."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""

    @property
    def num_answer_tokens(self) -> npt.NDArray[np.int64]:
        """Labelled tokens of each row."""


def tokenize(records: Sequence[Record], chat: ChatFormat, max_length: int, loss_on: LossOn = "last") -> TokenizedSplit:
    """Tokenise as the base's chat reads. Prompts that do not fit are made shorter, see `shortening`; the last answer is
    never cut.

    Raises:
        DataError: a record cannot be formatted with the base's chat template.
    """
    starts = range(0, max(1, len(records)), AT_ONCE)
    parts = [_tokenized(records[start : start + AT_ONCE], chat, max_length, loss_on) for start in starts]
    return TokenizedSplit(
        ids=[name for part in parts for name in part.ids],
        tokens=np.concatenate([part.tokens for part in parts]),
        labelled=np.concatenate([part.labelled for part in parts]),
        offsets=_offsets(np.concatenate([part.lengths for part in parts])),
        num_prompt_tokens=np.concatenate([part.num_prompt_tokens for part in parts]),
        too_long=list(dict.fromkeys(name for part in parts for name in part.too_long)),
        cut=list(dict.fromkeys(name for part in parts for name in part.cut)),
    )


def _tokenized(records: Sequence[Record], chat: ChatFormat, max_length: int, loss_on: LossOn) -> TokenizedSplit:
    rows_of = list(zip(records, chat.rows_of(records, loss_on), strict=True))
    owners = [(record, len(rows)) for record, rows in rows_of for _ in rows]
    read = pieces.read(chat.tokenizer, [row for _, rows in rows_of for row in rows])
    excess = partial(_excess, chat=chat, max_length=max_length)
    no_room = [
        max_length - len(_ended(row[-1], chat)) < min(MIN_PROMPT_TOKENS, sum(map(len, row[:-1])))
        or chat.ends_early(record, loss_on)
        for (record, _), row in zip(owners, read, strict=True)
    ]
    is_cut = [not is_out and excess(row) > 0 for is_out, row in zip(no_room, read, strict=True)]
    # Where a template makes a row for each answer, a shorter conversation has other rows.
    alone = [place for place, (_, num_rows) in enumerate(owners) if is_cut[place] and num_rows == 1]
    shorter = shortening.fitted([(owners[place][0], read[place]) for place in alone], chat, loss_on, excess)
    for place, found in zip(alone, shorter, strict=True):
        read[place] = found or read[place]
    rows, labels, num_prompt_tokens = [], [], []
    kept = [place for place, is_out in enumerate(no_room) if not is_out]
    for *before, last in (read[place] for place in kept):
        answer = _ended(last, chat)
        prompt = [token for piece in before for token in piece]
        lost = max(0, len(prompt) + len(answer) - max_length)  # of what no shorter text made fit
        earlier = _earlier_answers(before, chat)[lost:]
        earlier &= ~np.logical_and.accumulate(earlier)  # what is left of an answer that is cut in two is not learned
        rows.append(np.array(prompt[lost:] + answer, dtype=np.int32))
        labels.append(np.concatenate([earlier, np.ones(len(answer), dtype=np.bool_)]))
        num_prompt_tokens.append(len(prompt) - lost)
    return TokenizedSplit(
        ids=[owners[place][0].id for place in kept],
        tokens=np.concatenate([np.zeros(0, dtype=np.int32), *rows]),
        labelled=np.concatenate([np.zeros(0, dtype=np.bool_), *labels]),
        offsets=_offsets([len(row) for row in rows]),
        num_prompt_tokens=np.array(num_prompt_tokens, dtype=np.int32),
        too_long=[record.id for (record, _), is_out in zip(owners, no_room, strict=True) if is_out],
        cut=[record.id for (record, _), each in zip(owners, is_cut, strict=True) if each],
    )


def _excess(row: Sequence[Sequence[int]], *, chat: ChatFormat, max_length: int) -> int:
    """By how many tokens a row is too long; its last piece is the answer."""
    return sum(map(len, row[:-1])) + len(_ended(list(row[-1]), chat)) - max_length


def plan_epoch(
    lengths: npt.NDArray[np.int64], *, batch_size: int, group_by_length: bool, seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """The batches of one epoch, each an array of record indices. Pure, so that resuming needs no state for it.

    Every record occurs once; a last short batch is filled up with records from the epoch's start, so that every batch
    can be shared out evenly. With `group_by_length`, runs of MEGABATCH shuffled batches are sorted by length, cut again
    and shuffled: like lengths meet while each batch stays a near-random sample.
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
    """Deal a batch out: for each round the records of each worker, shape (num_workers, B).

    Neighbours in length go to different workers, so that all do equal work in each round. With `max_tokens` a round is
    of as many records of like length as stay within it on each worker, padding included, and of one at least; `lengths`
    are those of all records. Places are left empty (`NO_RECORD`) where the workers are too many for even shares.
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
    """Up to a multiple of `step`."""
    return np.pad(batch, (0, -len(batch) % step), constant_values=NO_RECORD)


def collate(
    split: TokenizedSplit, indices: Sequence[int] | npt.NDArray[np.int64], pad: int
) -> dict[str, "torch.Tensor"]:
    """Pad records on the right. Gives `input_ids` and `labels`, both int64 of shape (B, T); labels are not shifted."""
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
    """How many tokens all rows begin with, of the first `most`, which each has."""
    equal = np.logical_and.reduce([row[:most] == rows[0][:most] for row in rows])
    return most if equal.all() else int(equal.argmin())


def by_length(lengths: npt.NDArray[np.int64], batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Indices in batches of like length, longest first, so that running out of memory happens at once or never."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _offsets(lengths: "Sequence[int] | npt.NDArray[np.int64]") -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _ended(tokens: list[int], chat: ChatFormat) -> list[int]:
    """Up to and with the first stop: what a template writes after it, generation never sees."""
    stop = _first_stop(tokens, chat)
    return [*tokens, chat.end_of_turn] if stop is None else tokens[: stop + 1]


def _first_stop(tokens: list[int], chat: ChatFormat) -> int | None:
    return next((place for place, token in enumerate(tokens) if token in chat.stops), None)


def _earlier_answers(pieces: Sequence[list[int]], chat: ChatFormat) -> npt.NDArray[np.bool_]:
    """Of each token of a prompt in pieces, whether it belongs to an answer: every second piece up to its stop."""
    flags = [np.zeros(len(tokens), dtype=np.bool_) for tokens in pieces]
    for tokens, labelled in zip(pieces[1::2], flags[1::2], strict=True):
        stop = _first_stop(tokens, chat)
        labelled[: len(tokens) if stop is None else stop + 1] = True
    return np.concatenate(flags)
