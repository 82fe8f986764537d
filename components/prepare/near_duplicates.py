"""Training prompts that hardly differ from a held-out one, and so would leak it; pure.

Found exactly, and not by MinHash: with what is held out on one side, prefix filtering leaves few pairs to compare
(Bayardo, Ma and Srikant, Scaling Up All Pairs Similarity Search, WWW 2007, section 4.3).
"""

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Shingles = npt.NDArray[np.uint64]
"""Hashes of all that stands in a text, a few characters at a time, each once."""

CHARS = 5
ROUNDING = 1e-9
COMMON, COMMON_AT_LEAST = 0.05, 3
"""What is in more than this share of the held-out prompts, and in more than so many, is no similarity."""
FACTORS: Shingles = np.array(
    [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5],
    dtype=np.uint64,
)
"""xxHash's primes, one for each character of a shingle."""


def near_duplicates(prompts: Iterable[str], held_out: Sequence[str], *, similarity: float) -> list[bool]:
    """Of each prompt, whether it shares at least this much of what it says with one that is held out.

    `similarity`, above 0 and at most 1, is Jaccard's, of the sets of five characters in a row. Case, punctuation and
    white space count for nothing, nor does what a good part of all prompts say in the same words.
    """
    in_held_out = [_shingles(text) for text in held_out]
    seen, counts = np.unique(np.concatenate(in_held_out), return_counts=True)
    most = max(COMMON_AT_LEAST, COMMON * len(held_out))

    def rarest_first(shingles: Shingles) -> Shingles:
        places = np.searchsorted(seen, shingles).clip(max=len(seen) - 1)
        often = np.where(seen[places] == shingles, counts[places], 0)
        order = np.lexsort((shingles, often))
        return shingles[order][: np.count_nonzero(often <= most)]

    def prefix(shingles: Shingles) -> list[int]:
        # Two sets that are as similar have one of these in common. A product that is whole may come out above itself.
        first: list[int] = shingles[: len(shingles) - math.ceil(similarity * len(shingles) - ROUNDING) + 1].tolist()
        return first

    known = [rarest_first(each) for each in in_held_out]
    rows_with: dict[int, list[int]] = {}
    for row, each in enumerate(known):
        for shingle in prefix(each):
            rows_with.setdefault(shingle, []).append(row)

    def is_near(text: str) -> bool:
        ours = rarest_first(_shingles(text))
        rows = {row for shingle in prefix(ours) for row in rows_with.get(shingle, ())}
        return any(_jaccard(ours, known[row]) >= similarity - ROUNDING for row in rows)

    return [is_near(text) for text in prompts]


def _shingles(text: str) -> Shingles:
    said = " ".join(re.findall(r"\w+", text.casefold())).ljust(CHARS)
    characters = np.frombuffer(said.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(characters, CHARS)
    return np.unique((windows * FACTORS).sum(axis=1, dtype=np.uint64))


def _jaccard(one: Shingles, other: Shingles) -> float:
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)
