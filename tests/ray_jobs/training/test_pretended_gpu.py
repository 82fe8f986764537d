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
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from components.config import config_file
from components.config.methods import METHODS
from components.config.schema import RunConfig
from components.store.store import Store
from ray_jobs.base import base_model
from ray_jobs.scoring import answers, generation
from ray_jobs.text import chat_format
from ray_jobs.text.batching import tokenize
from tests.doubles.datasets import validate
from tests.doubles.pretended_gpu import Mixed, PretendedGpu
from tests.models.spec import changed
from tests.models.tiny import colour_rows
from tests.models.train_group import fit_in_rank, in_group
from tests.ray_jobs.training.in_store import in_store

ROWS = colour_rows(36)  # 31 to train on in two steps, and 5 held out
SLOW = pytest.mark.slow
WAYS: dict[str, list[str]] = {
    **{name: [f"method.name={name}"] for name in METHODS},
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
OFFLOADED = (*Z3, "train.cpu_offload=true")
LOADED_ON_CPU = ("ray_jobs.base.base_model:load_model", 'torch.cuda.current_device() if use_gpu else "cpu"', '"cpu"')
FAULTS = {
    "a 4-bit weight's statistics": Fault(*LOADED_ON_CPU, "841f52b1", (*Z3, "method.name=qdora")),
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
        "huggingface/transformers#45861",
    ),
    "the base": Fault(*LOADED_ON_CPU, "huggingface/peft#1831"),
    "a mask of what is left of the prompts": Fault(
        "transformers.masking_utils:sdpa_mask",
        "torch.arange(kv_length, device=device)",
        "torch.arange(kv_length)",
        "huggingface/transformers#28369",
    ),
    "which tokens of answers are padding": Fault(
        "ray_jobs.scoring.generation:Reader.nll", ".long().to(device)", ".long()", "huggingface/transformers#18540"
    ),
    "where the sequences of a packed row end": Fault(
        "ray_jobs.base.packing:Packing.lengths", ".int().to(self.device)", ".int()", "huggingface/transformers#46848"
    ),
    "a packed row's tables": Fault(
        "ray_jobs.base.packing:Packing.on", "return self._elsewhere[device]", "return self", OURS
    ),
    "the first check's table, by NCCL": Fault(
        "ray_jobs.training.step_zero:require_same", "=worker.device", "='cpu'", "Lightning-AI/pytorch-lightning#7273"
    ),
    "the dtype that is agreed on, by NCCL": Fault(
        "ray_jobs.base.architecture:agree_on_dtype", "device=device", "device='cpu'", "zai-org/CogVLM#328"
    ),
    "the sum of losses": Fault(
        "ray_jobs.training.train_loop:take_step", "worker.device)\n    for", "'cpu')\n    for", "huggingface/trl#949"
    ),
    "the held-out loss, by NCCL": Fault(
        "ray_jobs.training.train_loop:held_out_loss", "total = total.to(worker.device)", "pass", "huggingface/trl#451"
    ),
    "the number of a checkpoint, by NCCL": Fault(
        "ray_jobs.training.checkpoint:resume", "device=engine.device", "device='cpu'", "mistralai/mistral-inference#252"
    ),
    "weights that are shared out, by NCCL": Fault(
        "deepspeed.runtime.zero.partition_parameters:Init._convert_to_zero_parameters",
        "param.data.to(self.local_device)",
        "param.data.cpu()",
        "Lightning-AI/pytorch-lightning#10378",
        OFFLOADED,
    ),
    "the norm of offloaded gradients": Fault(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.complete_grad_norm_calculation_for_cpu_offload",
        "return total_norm.cpu()",
        "return total_norm",
        "deepspeedai/DeepSpeed#5461",
        OFFLOADED,
    ),
    "what is to be pinned": Fault(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._create_param_groups_fp16_flat_cpu_memory",
        "torch.empty(int(flat_buffer_size), dtype=self.dtype)",
        "torch.empty(int(flat_buffer_size), dtype=self.dtype, device=get_accelerator().current_device_name())",
        "deepspeedai/DeepSpeed#5472",
        OFFLOADED,
    ),
    "a checkpoint's copies, read as they arrive": Fault(
        "ray_jobs.training.checkpoint:_copied", ".cpu()", ".to('cpu', non_blocking=True)", "NVIDIA/Megatron-LM#833"
    ),
    "moments that are resumed": Fault(
        "ray_jobs.training.zero:restore", ".to(master.device)", "", "huggingface/transformers#24708", resumes=True
    ),
    "a magnitude that starts at the norm": Fault(
        "ray_jobs.adapters.dora:start_at_the_norm",
        "norm.to(magnitude.weight.device)",
        "norm.cpu()",
        "meta-pytorch/torchtune#2139",
        ("method.name=qdora",),
    ),
    "trained weights": Fault(
        "ray_jobs.training.worker:fit", "trained.weights[name].to(parameter.device)", "trained.weights[name]", OURS
    ),
}
"""Each is drawn from a mend of ours, a commit, or from a thread of somebody who had it, with the line that would do the
same here."""


def plant(fault: Fault) -> None:
    """Put the fault into its function, wherever a module of ours has taken that from."""
    name, _, path = fault.function.partition(":")
    owner, _, attribute = path.rpartition(".")
    module: Any = importlib.import_module(name)
    holder = getattr(module, owner) if owner else module
    planted = vars(holder)[attribute]
    function = inspect.unwrap(planted.func if isinstance(planted, cached_property) else planted)
    source = textwrap.dedent(inspect.getsource(function))
    wrong = source.replace(fault.right, fault.wrong)
    assert wrong != source, f"{fault.function} has no longer {fault.right!r}"
    scope: dict[str, Any] = {}
    exec(compile(wrong, name, "exec"), module.__dict__, scope)
    if isinstance(scope[attribute], cached_property):
        scope[attribute].__set_name__(holder, attribute)
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
            others, marks = generation.other_prompts(split, config.model.max_length), answers.named(config.metrics)
            how = {"marks": marks, "batch_size": 2, "max_new_tokens": 4, "advance": lambda _: None}
            scores = generation.score(ran.adapted.eval(), chat, records, split, others, **how)
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
    with PretendedGpu() as gpu:
        weight = torch.ones(2, 2, device="cuda", requires_grad=True)
        with torch.autograd.graph.save_on_cpu(pin_memory=True):  # as transformers offloads activations
            loss = (weight * weight).sum()
        loss.backward()
        assert gpu.is_on_gpu(weight.grad)
        copied = weight.detach().to("cpu", non_blocking=True)
        with pytest.raises(Mixed, match="while the GPU copies it"):
            copied.clone()
        with pytest.raises(Mixed, match="while the GPU copies it"):
            copied.numpy()
        copied.to("cuda")  # after the copy, in the GPU's own order
        torch.cuda.synchronize()
        assert copied.sum() == 4
        for pin in (weight.detach().pin_memory, lambda: torch.empty(2, device="cuda", pin_memory=True)):
            with pytest.raises(Mixed, match="can be pinned"):
                pin()
        assert torch.empty(2, pin_memory=True).is_pinned()


@pytest.mark.parametrize("way", [pytest.param(way, marks=[] if way == "qlora" else [SLOW]) for way in WAYS])
def test_a_training_and_its_answers_leave_nothing_on_the_wrong_device(way: str, on_gpu: RunConfig, tmp_path: Path):
    config = changed(on_gpu, *WAYS[way])
    (ran,) = in_ranks(config, tmp_path)
    assert ran.checked > 5000
    assert ran.losses[-1] < ran.losses[0]
    assert len(ran.answers) == (3 if config.train.zero_stage < 3 else 0)


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
