from functools import cache

import pytest

from components.config.gpus import GPUS
from components.config.schema import MethodConfig
from ray_jobs.planning.memory import Sharing, plan
from ray_jobs.planning.rehearsal import Rehearsal
from ray_jobs.planning.speed import speed
from tests.models import shapes
from tests.models.published import MEMORY, QLORA_65B, SPEED, Memory


@cache
def rehearsal(shape: str, rank: int, targets="all-linear") -> Rehearsal:
    targets = list(targets) if isinstance(targets, tuple) else targets
    method = MethodConfig(name="lora", rank=rank, target_modules=targets)
    return Rehearsal(getattr(shapes, shape), method, reference="published")


def planned_gb(published: Memory) -> float:
    rehearsed = rehearsal(published.shape, published.rank, published.targets)
    step = rehearsed.step(published.batch, published.length, checkpointing=published.checkpointing)
    parts = plan(
        rehearsed.stats,
        step,
        base=published.base,
        answers=published.batch * published.length * published.all_logits,
        sharing=Sharing(published.num_workers, published.zero_stage),
        in_chunks=False,
    )
    return parts.total / 1e9


FIRST = 3
"""Of the published trainings that `make test` plans; `make slow` plans the others."""


@pytest.mark.parametrize(
    "published",
    [*MEMORY[:FIRST], *(pytest.param(row, marks=pytest.mark.slow) for row in MEMORY[FIRST:])],
    ids=lambda row: f"{row.who[:12]}-{row.base}-{row.batch}x{row.length}",
)
def test_published_memory_is_planned_within_a_fifth(published):
    assert planned_gb(published) == pytest.approx(published.gb, rel=0.2), published.why


def test_65b_fits_on_one_gpu_of_48_gb_once_its_optimizer_may_be_paged_out():
    rehearsed = rehearsal(QLORA_65B.shape, QLORA_65B.rank)
    step = rehearsed.step(QLORA_65B.batch, QLORA_65B.length, checkpointing=True)
    parts = plan(rehearsed.stats, step, base="nf4", answers=512, sharing=Sharing(1, 1, cpu_offload=True))
    assert 36 < parts.total / 1e9 < QLORA_65B.gb < (parts.total + parts.host) / 1e9


@pytest.mark.parametrize("published", SPEED, ids=lambda row: f"{row.who[:12]}-{row.base}-{row.length}")
def test_published_speed_is_planned_within_a_third(published):
    expected = speed(
        rehearsal(published.shape, published.rank).stats,
        GPUS[published.gpu],
        num_gpus=1,
        base=published.base,
        adapter="lora",
        length=published.length,
        answer_share=1.0,
        checkpointing=published.checkpointing,
    )
    assert expected.tokens_per_s == pytest.approx(published.tokens_per_s, rel=1 / 3)
