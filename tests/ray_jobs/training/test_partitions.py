"""How optimizer state is dealt out anew, by hand-made workers. The judge is the state that nobody has cut."""

import pytest
import torch

from components.shared.errors import IntegrityError
from ray_jobs.training.checkpoint import Part, Piece, deal

WHOLE = {"a": torch.arange(0.0, 10), "b": torch.arange(10.0, 17), "c": torch.arange(17.0, 29)}
PADDING = 2


def cut_flat(num_workers: int) -> list[Part]:
    """One parameter after the other, then cut, as ZeRO 1 and 2 do."""
    flat = torch.cat([*WHOLE.values(), torch.full([PADDING], -1.0)])
    flat = torch.cat([flat, torch.full([-len(flat) % num_workers], -1.0)])
    most = len(flat) // num_workers
    parts = []
    for rank in range(num_workers):
        pieces, start = [], 0
        for name, values in WHOLE.items():
            first, last = max(start, rank * most), min(start + len(values), (rank + 1) * most)
            if first < last:
                pieces.append(Piece(name, first - start, last - first, 0, first - rank * most))
            start += len(values)
        state = {"step": torch.tensor(7.0), "master": flat[rank * most : (rank + 1) * most]}
        parts.append(Part(pieces, [state]))
    return parts


def cut_each(num_workers: int) -> list[Part]:
    """Each parameter by itself, as ZeRO 3 does."""
    parts = []
    for rank in range(num_workers):
        pieces, held = [], []
        for name, values in WHOLE.items():
            most = -(-len(values) // num_workers)
            mine = values[rank * most : (rank + 1) * most]
            pieces.append(Piece(name, rank * most, len(mine), 0, sum(map(len, held))))
            held += [mine, torch.full([most - len(mine)], -1.0)]
        parts.append(Part(pieces, [{"step": torch.tensor(7.0), "master": torch.cat(held)}]))
    return parts


def cut_nothing(num_workers: int) -> list[Part]:
    """Each parameter whole on every worker, in a partition of its own."""
    pieces = [Piece(name, 0, len(values), number, 0) for number, (name, values) in enumerate(WHOLE.items())]
    states = [{"step": torch.tensor(7.0), "master": values} for values in WHOLE.values()]
    return [Part(pieces, states)] * num_workers


WAYS = [(cut, count) for cut in (cut_flat, cut_each, cut_nothing) for count in (1, 2, 3, 5)]


@pytest.mark.parametrize(("found", "found_workers"), WAYS)
@pytest.mark.parametrize(("wanted", "wanted_workers"), WAYS)
def test_state_that_is_dealt_out_anew_is_that_of_workers_who_always_held_it(
    found, found_workers, wanted, wanted_workers
):
    for expected in wanted(wanted_workers):
        sizes = [len(state["master"]) for state in expected.states]
        states = deal(found(found_workers), expected.pieces, sizes)
        for state, other in zip(states, expected.states, strict=True):
            torch.testing.assert_close(state["master"], other["master"].clamp(min=0))
            assert state["step"] == 7


def test_a_part_that_is_missing_is_noticed():
    (alone,) = cut_flat(1)
    with pytest.raises(IntegrityError, match="lack 16 of the optimizer's elements"):
        deal(cut_flat(2)[1:], alone.pieces, [31])
