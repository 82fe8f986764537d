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

from components.config import config_file
from components.config.methods import METHODS
from components.config.schema import RunConfig
from components.store.store import Store
from tests.models.spec import changed
from tests.models.tiny import colour_rows
from tests.models.train_group import in_group

ROWS = colour_rows(36)  # 31 to train on in two steps, and 5 held out
SLOW = pytest.mark.slow
WAYS: dict[str, list[str]] = {
    **{f"ZeRO {stage}, offloaded": [f"train.zero_stage={stage}", "train.cpu_offload=true"] for stage in (2, 3)},
    "ZeRO 3, QDoRA": ["train.zero_stage=3", "method.name=qdora"],
    "ZeRO 3, LoRA": ["train.zero_stage=3", "method.name=lora"],
    "8-bit AdamW": ["train.optimizer=adamw_8bit"],
    "paged AdamW": ["train.optimizer=paged_adamw_8bit"],
    "int8": ["method.name=lora", "method.base=int8"],
    "float16, in which ZeRO 0 is 1": ["train.zero_stage=0", "train.dtype=float16"],
    "recomputed": ["train.gradient_checkpointing=true"],
    "activations offloaded": ["train.gradient_checkpointing=true", "train.activation_offloading=true"],
}


@dataclass(frozen=True)
class Fault:
    """A line of ours or upstream's that leaves something on the wrong device."""

    function: str
    """MODULE:FUNCTION, in whose source `right` becomes `wrong`."""
    right: str
    wrong: str
    drawn_from: str
    changes: tuple[str, ...] = ()
    resumes: bool = False
    """Whether it is met by who goes on from a checkpoint."""


OURS, Z3 = "a line of ours", ("train.zero_stage=3",)
FAULTS = {
    "a 4-bit weight's statistics": Fault(
        "ray_jobs.base.base_model:load_model",
        'torch.cuda.current_device() if use_gpu else "cpu"',
        '"cpu"',
        "841f52b1",
        (*Z3, "method.name=qdora"),
    ),
    "statistics of the statistics": Fault(
        "bitsandbytes.functional:quantize_4bit",
        "quantize_blockwise(_absmax - offset, blocksize=256)",
        "quantize_blockwise((_absmax - offset).cpu(), blocksize=256)",
        "huggingface/diffusers#10798",
    ),
    "positions of the rotary embedding": Fault(
        "transformers.models.llama.modeling_llama:LlamaRotaryEmbedding.forward",
        "self.inv_freq.to(device=x.device, dtype=torch.float)",
        "self.inv_freq.cpu().float()",
        "a line of transformers'",
    ),
    "a packed row's tables": Fault(
        "ray_jobs.base.packing:Packing.on", "return self._elsewhere[device]", "return self", OURS
    ),
    "a packed row's targets": Fault(
        "ray_jobs.text.answer_loss:records_nll", "row.targets.to(device)", "row.targets", OURS
    ),
    "token ids": Fault(
        "ray_jobs.text.answer_loss:records_nll", 'batch["input_ids"].to(device)', 'batch["input_ids"]', OURS
    ),
    "the first check's records": Fault(
        "ray_jobs.training.step_zero:probe_nll", 'batch["input_ids"].to(device)', 'batch["input_ids"]', OURS
    ),
    "the first check's table, by NCCL": Fault(
        "ray_jobs.training.step_zero:require_same", "device=worker.device", "device='cpu'", OURS
    ),
    "the dtype that is agreed on, by NCCL": Fault(
        "ray_jobs.base.architecture:agree_on_dtype", "device=device", "device='cpu'", OURS
    ),
    "the sum of losses": Fault(
        "ray_jobs.training.train_loop:take_step", "device=worker.device)\n    for", "device='cpu')\n    for", OURS
    ),
    "the held-out loss, by NCCL": Fault(
        "ray_jobs.training.train_loop:held_out_loss", "total = total.to(worker.device)", "pass", OURS
    ),
    "the number of a checkpoint, by NCCL": Fault(
        "ray_jobs.training.checkpoint:resume", "device=engine.device", "device='cpu'", OURS
    ),
    "moments that are resumed": Fault(
        "ray_jobs.training.zero:restore", "tensors[name].to(master.device)", "tensors[name]", OURS, resumes=True
    ),
    "a magnitude that starts at the norm": Fault(
        "ray_jobs.adapters.dora:start_at_the_norm",
        "norm.to(magnitude.weight.device)",
        "norm.cpu()",
        OURS,
        ("method.name=qdora",),
    ),
    "trained weights": Fault(
        "ray_jobs.training.worker:fit", "trained.weights[name].to(parameter.device)", "trained.weights[name]", OURS
    ),
}


def plant(fault: Fault) -> None:
    """Put the fault into its function, wherever a module of ours has taken that from."""
    name, _, path = fault.function.partition(":")
    owner, _, attribute = path.rpartition(".")
    module: Any = importlib.import_module(name)
    holder = getattr(module, owner) if owner else module
    function = inspect.unwrap(getattr(holder, attribute))
    source = textwrap.dedent(inspect.getsource(function))
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
    from tests.doubles.pretended_gpu import PretendedGpu
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
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}", "ray.use_gpu=true"]
    return changed(config, *place, "ray.num_workers=1", "method.name=qlora", "train.max_steps=2")


def in_ranks(config: RunConfig, directory: Path, run_id: str = "run", fault: Fault | None = None) -> list[Ran]:
    toml, num_workers = config_file.dumps(config), config.ray.max_workers
    found: list[Ran] = in_group(run, toml, run_id, fault, directory=directory / "logs", num_workers=num_workers)
    return found


@pytest.mark.parametrize("method", [pytest.param(name, marks=[] if name == "qlora" else [SLOW]) for name in METHODS])
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
@pytest.mark.parametrize("changes", [["method.name=loftq"], ["method.name=dvora", "method.base=nf4", *Z3]])
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
    config = changed(on_gpu, *fault.changes, *(["train.checkpoint_every_steps=1"] if fault.resumes else []))
    if fault.resumes:
        in_ranks(config, tmp_path)
    with pytest.raises(RuntimeError, match=r"Mixed: |they must move together|must be on CUDA"):
        in_ranks(config, tmp_path, fault=fault)
