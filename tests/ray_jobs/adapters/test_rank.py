"""How large an update grows with the rank, which scaling decides: rsLoRA's must not (arXiv:2312.03732, theorem 3.2)."""

from pathlib import Path

import pytest

from components.config import config_file
from components.config.schema import RunConfig
from tests.models.ranks import relative_size
from tests.models.tiny import build_base, colour_rows


@pytest.mark.full
def test_rsloras_update_is_as_large_at_every_rank(config: RunConfig, tmp_path: Path):
    # A base wider than the ranks, as the theorem has it.
    base = build_base(tmp_path, width=512)

    def size(rank: int) -> float:
        changes = [f"model.base={base}", "method.name=rslora", f"method.rank={rank}", "ray.num_workers=1"]
        changes += ["train.learning_rate=6e-5", "train.max_steps=4"]
        return relative_size(config_file.dumps(config_file.loads(config_file.dumps(config), changes)), colour_rows(160))

    sizes = [size(rank) for rank in (8, 256)]
    assert max(sizes) < 1.5 * min(sizes)
    assert min(sizes) > 1e-4
