"""The training worker on a pretended GPU: nothing of it is left on the wrong device, and what is left is found.

From the base's first weight to the last answer that is generated: loading with a device map, NF4 and int8, adapters,
DeepSpeed at every stage, collectives, checkpoints and what is resumed from them. tests/doubles/pretended_gpu.py says
what that shows, and what it cannot.
"""

import importlib
import inspect
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config import config_file
from components.config.schema import RunConfig
from components.store.store import Store
from tests.doubles.pretended_gpu import Mixed, PretendedGpu
from tests.models.spec import changed
from tests.models.tiny import colour_rows
from tests.models.train_group import in_group
from tests.ray_jobs.training.in_store import in_store

ROWS = colour_rows(36)  # 31 to train on in two steps, and 5 held out
SLOW = pytest.mark.slow
WAYS: dict[str, list[str]] = {
    **{f"ZeRO {stage}, offloaded": [f"train.zero_stage={stage}", "train.cpu_offload=true"] for stage in (2, 3)},
    "ZeRO 3, QDoRA": ["train.zero_stage=3", "method.name=qdora"],
    "ZeRO 3, LoRA": ["train.zero_stage=3", "method.name=lora"],
    "8-bit AdamW": ["train.optimizer=adamw_8bit"],
    "int8": ["method.name=lora", "method.base=int8"],
    "float16, in which ZeRO 0 is 1": ["train.zero_stage=0", "train.dtype=float16"],
    "activations offloaded": ["train.gradient_checkpointing=true", "train.activation_offloading=true"],
}


@dataclass(frozen=True)
class Fault:
    """A line that leaves something on the wrong device, as somebody once had it there."""

    function: str
    """MODULE:FUNCTION, in whose source `right` becomes `wrong`."""
    right: str
    wrong: str
    changes: tuple[str, ...] = ()


FAULTS = {
    "a 4-bit weight's statistics": Fault(
        "ray_jobs.base.base_model:load_model",
        'torch.cuda.current_device() if use_gpu else "cpu"',
        '"cpu"',
        ("train.zero_stage=3", "method.name=qdora"),
    ),
    "which tokens of answers are padding": Fault(
        "ray_jobs.scoring.generation:Reader.nll",
        "(targets != IGNORED).long().to(device)",
        "(targets != IGNORED).long()",
    ),
    "the dtype that is agreed on, by NCCL": Fault(
        "ray_jobs.base.architecture:agree_on_dtype", "device=device", "device='cpu'"
    ),
    "a checkpoint's copies, read as they arrive": Fault(
        "ray_jobs.training.checkpoint:_copied", ".detach().cpu()", ".detach().to('cpu', non_blocking=True)"
    ),
}


def plant(fault: Fault) -> None:
    """Put the fault into its function, wherever a module of ours has taken that from."""
    name, _, path = fault.function.partition(":")
    owner, _, attribute = path.rpartition(".")
    module: Any = importlib.import_module(name)
    holder = getattr(module, owner) if owner else module
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(vars(holder)[attribute])))
    wrong = source.replace(fault.right, fault.wrong)
    assert wrong != source, f"{fault.function} has no longer {fault.right!r}"
    scope: dict[str, Any] = {}
    exec(compile(wrong, name, "exec"), module.__dict__, scope)
    setattr(holder, attribute, scope[attribute])


@dataclass(frozen=True)
class Ran:
    """A rank's run on its pretended GPU."""

    losses: list[float]
    checked: int
    answers: list[str]


def run(config_toml: str, run_id: str, fault: Fault | None = None) -> Ran:
    """What a rank does: it trains, and the adapter answers held-out records."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    os.environ.pop("DS_ACCELERATOR", None)
    import torch.distributed as dist

    from components.config import config_file
    from ray_jobs.base import base_model
    from ray_jobs.scoring import answers, generation
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import tokenize
    from tests.doubles.datasets import validate
    from tests.models.train_group import fit_in_rank

    if fault:
        plant(fault)
    config = config_file.loads(config_toml)
    with PretendedGpu() as gpu:
        ran = fit_in_rank(config, ROWS, run_id=run_id)
        texts = []
        if dist.get_world_size() == 1 and config.train.zero_stage < 3:
            chat = chat_format.load(base_model.resolve(config.model), config.model)
            records = [validate(row).record for row in ROWS[-3:]]
            split = tokenize(records, chat, config.model.max_length)
            scores = generation.score(
                ran.adapted.eval(),
                chat,
                records,
                split,
                generation.other_prompts(split, config.model.max_length),
                marks=answers.named(config.metrics),
                batch_size=2,
                max_new_tokens=4,
                advance=lambda _: None,
            )
            texts = [score.text for score in scores]
    losses = [record["loss"] for record in ran.records]
    return Ran(losses, gpu.checked.total(), texts)


@pytest.fixture
def on_gpu(config: RunConfig, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "cache"))
    return in_store(config, store, "ray.use_gpu=true", "ray.num_workers=1", "method.name=qlora", "train.max_steps=2")


def in_ranks(config: RunConfig, directory: Path, run_id: str = "run", fault: Fault | None = None) -> list[Ran]:
    toml, num_workers = config_file.dumps(config), config.ray.max_workers
    found: list[Ran] = in_group(run, toml, run_id, fault, directory=directory / "logs", num_workers=num_workers)
    return found


def test_the_pretended_gpu_waits_for_what_it_copies_and_pins_host_memory_alone():
    with PretendedGpu():
        weight = torch.ones(2, 2, device="cuda")
        copied = weight.to("cpu", non_blocking=True)
        with pytest.raises(Mixed, match="while the GPU copies it"):
            copied.numpy()
        torch.cuda.synchronize()
        assert copied.sum() == 4
        for pin in (weight.pin_memory, lambda: torch.empty(2, device="cuda", pin_memory=True)):
            with pytest.raises(Mixed, match="can be pinned"):
                pin()
        assert torch.empty(2, pin_memory=True).is_pinned()


@pytest.mark.parametrize("method", ["qlora", *(pytest.param(name, marks=SLOW) for name in ("dora", "vera", "dvora"))])
def test_a_method_is_trained_and_answers_on_the_gpu_alone(method: str, on_gpu: RunConfig, tmp_path: Path):
    (ran,) = in_ranks(changed(on_gpu, f"method.name={method}"), tmp_path)
    assert ran.checked > 5000
    assert ran.losses[-1] < ran.losses[0]
    assert len(ran.answers) == 3


@SLOW
@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_training_leaves_nothing_on_the_wrong_device(way: str, on_gpu: RunConfig, tmp_path: Path):
    (ran,) = in_ranks(changed(on_gpu, *WAYS[way]), tmp_path)
    assert ran.checked > 5000
    assert ran.losses[-1] < ran.losses[0]


@SLOW
@pytest.mark.parametrize(
    "changes", [["method.name=loftq"], ["method.name=dvora", "method.base=nf4", "train.zero_stage=3"]]
)
def test_two_workers_meet_by_nccl(changes: list[str], on_gpu: RunConfig, tmp_path: Path):
    one, other = in_ranks(changed(on_gpu, *changes, "ray.num_workers=2", "train.checkpoint_every_steps=1"), tmp_path)
    assert one.losses == other.losses
    assert min(one.checked, other.checked) > 5000


@SLOW
def test_paged_moments_are_resumed_on_the_gpu(on_gpu: RunConfig, tmp_path: Path):
    config = changed(on_gpu, "method.name=qdora", "train.optimizer=paged_adamw_8bit", "train.checkpoint_every_steps=1")
    (whole,) = in_ranks(config, tmp_path)
    (resumed,) = in_ranks(config, tmp_path)
    assert resumed.losses == whole.losses[-2:]  # the second step, and what is held out


FIRST = {"a 4-bit weight's statistics", "the dtype that is agreed on, by NCCL"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FIRST else [SLOW]) for name in FAULTS])
def test_a_planted_fault_is_found(name: str, on_gpu: RunConfig, tmp_path: Path):
    fault = FAULTS[name]
    with pytest.raises(RuntimeError, match=r"Mixed: |they must move together|must be on CUDA"):
        in_ranks(changed(on_gpu, *fault.changes), tmp_path, fault=fault)
