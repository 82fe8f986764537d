from pathlib import Path

import numpy as np
import pytest

from components.prepare import near_duplicates
from components.prepare.near_duplicates import Signatures, Signed


def drawn(rng: np.random.Generator, texts: int) -> Signatures:
    return Signatures(
        rng.integers(0, 50, (3, texts), np.uint32),
        rng.integers(0, 256, (texts, 6), np.uint8),
        rng.integers(0, 256, (texts, 4), np.uint8),
        rng.random(texts) < 0.9,
    )


@pytest.mark.parametrize("at_once", [1, 7, 2**14])
def test_signatures_on_disk_are_those_that_were_taken_in_parts(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    parts = [drawn(rng, texts) for texts in (5, 64, 1, 30)]
    whole = Signatures.joined(parts, texts=100)
    equals = rng.integers(0, 2**63, 100, np.uint64)
    found, begin = Signed(tmp_path, "some"), 0
    for part in parts:
        found.add(part, equals[begin : begin + len(part.is_found)])
        begin += len(part.is_found)
    assert (found.equals == equals).all()
    places = rng.integers(0, 100, 300)  # in no order, and some of them twice
    for one, other in zip(found.minima_at(places), whole.minima_at(places), strict=True):
        assert (one == other).all()
    assert [len(each) for each in found.minima_at(places[:0])] == [0, 0]
    kept = rng.random(100) < 0.7
    for band in range(3):
        hashes, texts = found.in_band(band, kept)
        pairs = [(whole.bands[band, text], text) for text in range(100) if kept[text] and whole.is_found[text]]
        assert list(zip(hashes.tolist(), texts.tolist(), strict=True)) == sorted(pairs)
