"""What ranks tell each other is JSON and tensors, whatever they say and however long it is."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ray_jobs
from components.shared.errors import ConfigError, FineloopError
from ray_jobs.base import together
from tests.models.train_group import in_group


def told() -> dict[str, Any]:
    """What this rank hears from the others, each of which says something else."""
    rank, num_workers = dist.get_rank(), dist.get_world_size()

    def refuse() -> None:
        raise ConfigError("method.init loftq: no such layer")

    with together.gloo_group(num_workers) as group:
        raised = []
        try:
            together.on_rank_0(refuse, rank=rank, group=group)
        except FineloopError as exc:
            raised = [type(exc).__name__, str(exc)]
        together.on_rank_0(lambda: None, rank=rank, group=group)
        together.meet(group)
        tensors = {"a": torch.arange(rank + 3).bfloat16(), "b": torch.tensor([[1.5, float("nan")]]).double()}
        if rank:
            together.send(tensors, 0, group)
            received = []
        else:
            received = [
                {name: (str(each.dtype), each.tolist()) for name, each in together.receive(other, group).items()}
                for other in range(1, num_workers)
            ]
        values = together.all_gather([rank, "Grüße" * rank, None, 0.1 + rank])
        return {"values": values, "first": together.from_rank_0(rank + 7, group), "raised": raised, "got": received}


def test_every_rank_hears_all_the_others(tmp_path):
    ranks = in_group(told, directory=tmp_path, num_workers=3)
    for found in ranks:
        assert found["values"] == [[0, "", None, 0.1], [1, "Grüße", None, 1.1], [2, "GrüßeGrüße", None, 2.1]]
        assert found["first"] == 7
        assert found["raised"] == ["ConfigError", "method.init loftq: no such layer"]
    one, two = ranks[0]["got"]
    assert one["a"] == ("torch.bfloat16", [0, 1, 2, 3])
    assert two["a"] == ("torch.bfloat16", [0, 1, 2, 3, 4])
    assert one["b"][0] == "torch.float64"
    assert str(one["b"][1]) == "[[1.5, nan]]"


def test_a_worker_alone_keeps_its_value_and_its_error():
    error = ConfigError("no")

    def refuse() -> None:
        raise error

    assert together.from_rank_0({"a": 1}, None) == {"a": 1}
    with pytest.raises(ConfigError) as raised:
        together.on_rank_0(refuse, rank=0, group=None)
    assert raised.value is error


def test_nothing_that_one_rank_sends_is_unpickled_by_another():
    root = Path(ray_jobs.__file__).parent
    found = {
        f"{path.relative_to(root)}: {node.attr}"
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and re.search(r"(gather|broadcast|scatter|send|recv)_object", node.attr)
    }
    assert not found
