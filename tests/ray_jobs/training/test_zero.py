"""What ZeRO-3, offloading and the optimizer promise, seen from inside two real ranks; and float16 with loss scaling, as
GPUs without bfloat16 train: DeepSpeed's own, here on CPU processes.

DeepSpeed lets a CPU do so only with instructions for it; PyTorch multiplies float16 on any, slowly.
"""

import gc
import math
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes.functional
import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, core_model_loading, modeling_utils
from transformers.integrations import is_deepspeed_zero3_enabled

from components.config import config_file
from components.config import schema as config
from components.config.schema import RunConfig
from components.shared.errors import JobError
from ray_jobs.base import architecture, base_model
from ray_jobs.planning.rehearsal import Rehearsal
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.training import checkpoint, opening, train_loop, zero
from tests.doubles.pretended_gpu import PretendedGpu
from tests.models.plain import plain_training
from tests.models.tiny import build_base, colour_rows
from tests.models.train_group import Trained, in_group, in_turn, train_in_rank
from tests.ray_jobs.conftest import CONFIG
from tests.ray_jobs.training.in_store import in_store


def changed(base: RunConfig, *changes: str) -> str:
    return config_file.dumps(config_file.loads(config_file.dumps(base), changes))


def live_bytes() -> int:
    """Bytes of all tensors in this process, whoever references them."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(held.values())


def kept_bytes() -> int:
    """Bytes of the tensors that stay. Gloo's threads hold gathered tensors until they run again (ProcessGroupGloo.cpp,
    runLoop), which on a busy machine is some time after the collective returned."""
    looks = []
    for _ in range(5):
        looks.append(live_bytes())
        time.sleep(0.05)
    return min(looks)


@dataclass(frozen=True)
class Held:
    """Bytes of tensors that a rank holds."""

    most: int
    """While the base was loaded."""
    loaded: int
    """Base and adapter, loaded and shared out."""
    between: int
    """What a forward pass adds and leaves for its backward pass."""


def held_bytes(config_toml: str) -> Held:
    """Measure what this rank holds, in bytes."""
    zero.prepare_environment(use_gpu=False)
    zero.LIVE_ELEMENTS = 1
    config.refusals = lambda _: iter(())  # type: ignore[attr-defined]  # to see what a refused cell would do
    loaded = config_file.loads(config_toml)
    base = base_model.resolve(loaded.model)
    input_ids = torch.arange(4)[None]
    before = live_bytes()
    most = before
    set_param = core_model_loading.set_param_for_module

    def seen(*arguments: Any) -> None:
        nonlocal most
        most = max(most, live_bytes())
        set_param(*arguments)

    core_model_loading.set_param_for_module = seen
    with zero.sharding(loaded):
        adapted: Any = opening.assemble(loaded, base, use_gpu=False)
        most = max(most, live_bytes())
        if loaded.train.zero_stage == 3:
            zero._share_out(adapted, loaded, torch.bfloat16)
        after_loading = kept_bytes()
        engine = zero.initialize(adapted, loaded)
        idle = kept_bytes()
        loss = engine(input_ids=input_ids, labels=input_ids).loss
        between = kept_bytes()
        engine.backward(loss)
    return Held(most - before, after_loading - before, between - idle)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for its matrices to outweigh everything else."""
    return build_base(tmp_path_factory.mktemp("wide-base"), width=256)


def held_at(zero_stage: int, config: RunConfig, *changes: str, directory: Path) -> list[Held]:
    """By each of two ranks; the cell need not be legal."""
    toml = changed(config, "method.rank=1", *changes)
    toml = toml.replace("zero_stage = 2", f"zero_stage = {zero_stage}")
    return in_group(held_bytes, toml, directory=directory, num_workers=2)


@pytest.mark.parametrize(
    "method", ["qlora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "qdora", "dvora"))]
)
def test_under_zero_3_no_rank_ever_holds_the_base_whole(config, wide_base, tmp_path, method):
    changes = [f"model.base={wide_base}", f"method.name={method}"] + ["method.base=nf4"] * (method == "dvora")
    whole = min(held.loaded for held in held_at(2, config, *changes, directory=tmp_path))
    for held in held_at(3, config, *changes, directory=tmp_path):
        assert held.loaded < 0.6 * whole
        assert method == "lora" or held.most < 0.75 * whole  # its share, and the layer that is being read
        assert held.between < 0.25 * whole


def devices_of_dequantisations(config_toml: str) -> list[tuple[str, str]]:
    """Where the codes and the statistics of each 4-bit weight lie when it is dequantised, on a pretended GPU, from the
    first weight of the base to a step's end."""
    zero.prepare_environment(use_gpu=False)
    loaded = config_file.loads(config_toml)
    base = base_model.resolve(loaded.model)
    seen: list[tuple[str, str]] = []
    dequantise = bitsandbytes.functional.dequantize_4bit

    def seeing(weight: Any, quant_state: Any, *others: Any, **more: Any) -> Any:
        seen.append((str(weight.device), str(quant_state.absmax.device)))
        return dequantise(weight, quant_state, *others, **more)

    with mock.patch.object(bitsandbytes.functional, "dequantize_4bit", seeing), PretendedGpu(), zero.sharding(loaded):
        opening.assemble(loaded, base, use_gpu=True)
    return seen


def test_under_zero_3_a_weight_and_its_statistics_lie_on_the_gpu_together(config, tmp_path):
    sharded = ["method.base=nf4", "train.zero_stage=3", "ray.num_workers=1"]
    calls = [(changed(config, f"method.name={method}", *sharded),) for method in ("qdora", "dvora")]
    (found,) = in_group(in_turn, devices_of_dequantisations, calls, directory=tmp_path, num_workers=1)
    for seen in found:
        assert len(seen) >= 14  # each layer's norm is read while the adapter is attached
        assert set(seen) == {("cuda:0", "cuda:0")}


def engine_facts(config_toml: str) -> dict[str, Any]:
    """How DeepSpeed has set itself up."""
    zero.prepare_environment(use_gpu=False)
    loaded = config_file.loads(config_toml)
    with zero.sharding(loaded):
        adapted = opening.assemble(loaded, base_model.resolve(loaded.model), use_gpu=False)
        engine = zero.initialize(adapted, loaded)
        found = engine.optimizer
        return {
            "optimizer": type(found.optimizer).__module__,
            "optimizer state": getattr(found, "cpu_offload", False) or getattr(found, "offload_optimizer", False),
            "parameters": getattr(found, "offload_param", False),
            "kept whole": sorted({parameter.ds_shape for parameter in getattr(found, "persistent_parameters", [])}),
        }


def test_offloading_keeps_optimizer_state_and_at_stage_3_weights_in_host_memory(config, tmp_path):
    ways = [*product((1, 2, 3), (False, True))]
    calls = [
        (changed(config, f"train.zero_stage={stage}", f"train.cpu_offload={str(off).lower()}"),) for stage, off in ways
    ]
    for found in in_group(in_turn, engine_facts, calls, directory=tmp_path, num_workers=2):
        for (zero_stage, is_offloaded), facts in zip(ways, found, strict=True):
            assert facts["optimizer"] == "torch.optim.adamw"
            assert facts["optimizer state"] is is_offloaded
            assert facts["parameters"] is (is_offloaded and zero_stage == 3)
            assert all(len(shape) == 1 for shape in facts["kept whole"])


def globals_after_sharding(config_toml: str) -> list[Any]:
    """What `sharding` must put back, before, within and after it."""
    zero.prepare_environment(use_gpu=False)
    loaded = config_file.loads(config_toml)
    base = base_model.resolve(loaded.model)
    linear = torch.nn.functional.linear
    seen: list[Any] = []

    def look() -> None:
        seen.append((is_deepspeed_zero3_enabled(), torch.nn.functional.linear is linear))

    look()
    with zero.sharding(loaded):
        base_model.load_model(base, loaded.model, "bf16", use_gpu=False)
        look()
    look()
    model = base_model.load_model(base, loaded.model, "bf16", use_gpu=False)
    return [*seen, all(parameter.numel() for parameter in model.parameters())]


def test_what_is_loaded_after_a_sharded_training_is_whole(config, tmp_path):
    toml = changed(config, "train.zero_stage=3", "ray.num_workers=1")
    (seen,) = in_group(globals_after_sharding, toml, directory=tmp_path, num_workers=1)
    assert seen == [(False, True), (True, False), (False, True), True]


def test_weights_that_were_not_shared_out_are_noticed():
    with pytest.raises(JobError, match=r"this worker holds 4,096 of their 4,096 bytes .* use train\.zero_stage=2"):
        zero.require_shared(torch.nn.Linear(32, 32), num_workers=2)
    zero.require_shared(torch.nn.Linear(32, 32), num_workers=1)


def steps_around_a_spoiled_one(config_toml: str, value: float) -> list[bool]:
    """Which of three steps moved this rank's weights, where a factor's gradient is `value` on rank 0 in the second."""
    zero.prepare_environment(use_gpu=False)
    loaded = config_file.loads(config_toml)
    is_spoiled, moved = False, []
    with zero.sharding(loaded):
        adapted: Any = opening.assemble(loaded, base_model.resolve(loaded.model), use_gpu=False)
        engine = zero.initialize(adapted, loaded)
        *_, factor = (each for name, each in adapted.named_parameters() if "lora_B" in name)
        factor.register_hook(lambda gradient: gradient * value if is_spoiled else gradient)
        input_ids = torch.arange(4)[None]
        for number in range(3):
            is_spoiled = number == 1 and torch.distributed.get_rank() == 0
            engine.optimizer.param_groups[0]["lr"] = 0.01
            before = {name: tensor.clone() for name, tensor in checkpoint.weights(engine.module).items()}
            for _ in range(zero.accumulation(loaded)):
                engine.backward(engine(input_ids=input_ids, labels=input_ids).loss)
                engine.step()
            after = checkpoint.weights(engine.module)
            assert all(tensor.isfinite().all() for tensor in after.values())
            moved.append(any(not torch.equal(after[name], tensor) for name, tensor in before.items()))
    return moved


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out_by_every_rank(config, tmp_path):
    tomls = [changed(config, f"train.zero_stage={stage}") for stage in (1, 2, 3)]
    calls = [*product(tomls, (float("nan"), float("inf")))]
    for found in in_group(in_turn, steps_around_a_spoiled_one, calls, directory=tmp_path, num_workers=2):
        assert found == [[True, False, True]] * len(calls)


BATCH, LENGTH = 4, 48


@pytest.mark.slow
def test_the_input_of_every_layer_leaves_and_the_gradients_are_what_they_were(tiny_base, monkeypatch):
    gone: list[torch.Tensor] = []

    def to_host(*, pin_memory: bool, device_type: str) -> saved_tensors_hooks:
        """As torch's save_on_cpu, without a GPU to copy from."""
        assert pin_memory
        return saved_tensors_hooks(lambda tensor: gone.append(tensor) or tensor.clone(), lambda tensor: tensor.clone())

    monkeypatch.setattr(modeling_utils, "save_on_cpu", to_host)
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 256
    gradients = []
    for is_offloaded in (False, True):
        changes = ["ray.use_gpu=true", "train.gradient_checkpointing=true"]
        config = config_file.loads(
            CONFIG.format(base=tiny_base), [*changes, f"train.activation_offloading={str(is_offloaded).lower()}"]
        )
        adapted = opening.assemble(config, base_model.resolve(config.model), use_gpu=False)
        answer_nll(adapted, tokens, tokens).mean().backward()
        gradients.append([each.grad for each in adapted.parameters() if each.requires_grad])
        assert len(gone) == 2 * is_offloaded  # the base's layers
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert any(gradient.any() for gradient in gradients[0])

    shape = AutoConfig.from_pretrained(tiny_base)
    planned = Rehearsal.of(config, shape).step(BATCH, LENGTH, checkpointing=True)
    assert planned.inputs == sum(tensor.nbytes for tensor in gone)
    assert planned.inputs <= planned.kept


ROWS = colour_rows(256)
NOISE = 0.03  # what gradients of 16 bits, summed in another order, may move a loss by over these steps


def test_deepspeed_scales_the_loss_dynamically_and_only_in_float16(config: RunConfig):
    half, wide = zero.settings(config, torch.float16), zero.settings(config, torch.bfloat16)
    assert half["fp16"]["enabled"]
    assert half["fp16"]["loss_scale"] == 0  # which DeepSpeed's documentation calls dynamic
    assert "bf16" not in half
    assert "fp16" not in wide
    assert wide["bf16"]["enabled"]


def train_in_float16(config_toml: str, first_scale: int) -> tuple[Trained, list[float | None]]:
    """One rank's part; and what the loss was multiplied by after each step."""
    zero.prepare_environment(use_gpu=False)
    from deepspeed.accelerator import get_accelerator

    scales, take_step = [], train_loop.take_step

    def seen(engine, *arguments, **others):
        assert {p.dtype for p in engine.module.parameters() if p.is_floating_point()} == {torch.float16}
        taken = take_step(engine, *arguments, **others)
        scales.append(zero.loss_scale(engine))
        return taken

    with (
        mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True),
        mock.patch.object(architecture, "dtype_here", return_value=torch.float16),
        mock.patch.object(train_loop, "take_step", seen),
    ):
        zero.LOSS_SCALING["initial_scale_power"] = round(math.log2(first_scale))
        return train_in_rank({"half": config_toml}, ROWS)["half"], scales


def test_a_base_of_few_bits_that_was_made_for_bfloat16_is_refused(config, store, tmp_path, monkeypatch):
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "cache"))
    toml = config_file.dumps(in_store(config, store, "method.name=loftq"))
    with pytest.raises(RuntimeError, match=r"ConfigError: .* is stored in few bits for bfloat16"):
        in_group(train_in_float16, toml, 2**12, directory=tmp_path, num_workers=2)


@pytest.mark.parametrize(
    ("zero_stage", "first_scale"),
    [
        pytest.param(0, 2**12, id="0-fitting", marks=pytest.mark.full),
        pytest.param(3, 2**12, id="3-fitting", marks=pytest.mark.full),
        pytest.param(0, 2**22, id="0-far too large", marks=pytest.mark.slow),
        pytest.param(3, 2**22, id="3-far too large", marks=pytest.mark.full),
    ],
)
def test_a_training_in_float16_takes_the_steps_of_a_plain_loop_once_its_scale_fits(
    config, store, tmp_path, zero_stage, first_scale
):
    changes = ["method.name=qdora", "ray.cpu_matmul_dtype=bfloat16", "train.early_stopping_patience=0"]
    toml = config_file.dumps(in_store(config, store, f"train.zero_stage={zero_stage}", *changes))
    found, scales = in_group(train_in_float16, toml, first_scale, directory=tmp_path, num_workers=2)[0]
    expected = plain_training(toml, ROWS)
    # A step whose gradients overflow is left out, and the scale halved.
    skipped = round(math.log2(first_scale / scales[-1]))
    assert scales[skipped:] == [scales[-1]] * (len(scales) - skipped)
    assert (skipped > 0) is (first_scale == 2**22), scales
    np.testing.assert_allclose(found.losses[: skipped + 1], [expected.losses[0]] * (skipped + 1), atol=1.0)
    if not skipped:
        np.testing.assert_allclose(found.losses, expected.losses, atol=NOISE)
    assert found.losses[-1] < found.losses[skipped]
