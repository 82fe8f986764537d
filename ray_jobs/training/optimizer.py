"""The AdamW variants of `train.optimizer`, and their state in a checkpoint.

adamw              PyTorch's: two moments in float32, 12 bytes per parameter with the float32 master weight
adamw_8bit         bitsandbytes': moments in 8 bits, in blocks of 256 with a float32 scale each (arXiv:2110.02861)
paged_adamw_8bit   the same in CUDA's unified memory, which can be paged out while the GPU memory is needed otherwise
                   (arXiv:2305.14314, section 3)

In every case DeepSpeed holds the master weights.
"""

from collections.abc import Mapping
from typing import Any

import torch

from components.config.schema import TrainConfig
from ray_jobs.adapters import dora

# bitsandbytes' code books for its two 8-bit data types, signed and unsigned, which it keeps in the optimizer state.
CONSTANTS = ("qmap1", "qmap2")
BLOCK = 256


def make(model: torch.nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimizer of all trained parameters. The caller must set its learning rate before every step."""
    groups = _groups(model, train.weight_decay)
    if train.optimizer == "adamw":
        # The fused kernel takes a third of the time on CPUs; on GPUs it would keep its step counts there. DeepSpeed's
        # master weights are in host memory with train.cpu_offload, wherever the parameters are.
        is_on_cpu = all(each.device.type == "cpu" for group in groups for each in group["params"])
        return torch.optim.AdamW(groups, lr=0.0, fused=is_on_cpu or train.cpu_offload or None)
    from bitsandbytes import optim

    kind = optim.AdamW8bit if train.optimizer == "adamw_8bit" else optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, lr=0.0)
    return optimizer


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of all trained parameters; DoRA magnitudes, if any, are a second group without weight decay."""
    magnitudes = list(dora.magnitudes(model))
    held = {id(parameter) for parameter in magnitudes}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    groups = [(others, weight_decay), (magnitudes, 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def forget_steps(state: dict[str, Any]) -> None:
    """Reset a parameter's step count to 0, where DeepSpeed has taken an empty step to create the optimizer state."""
    if "step" in state:
        state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0


def saved(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A parameter's optimizer state as tensors for a checkpoint; the step count is float32."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and name != "step"}
    return {
        "step": torch.as_tensor(float(state["step"])),
        **{name: value for name, value in tensors.items() if name not in CONSTANTS},
    }


def in_float32(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state from `saved` as flat tensors with one number per parameter element, so that it can be split anywhere.

    8-bit moments are dequantised; `restore` quantises them again, in possibly different blocks.
    """
    from bitsandbytes import functional

    state = {name: tensor.flatten() for name, tensor in tensors.items() if not name.startswith("absmax")}
    for number in ("1", "2"):
        name = f"state{number}"
        if name in state and state[name].dtype is torch.uint8:
            state[name] = functional.dequantize_blockwise(
                state[name],
                absmax=tensors[f"absmax{number}"],
                code=functional.create_dynamic_map(signed=number == "1"),
                blocksize=BLOCK,
            )
    return {**state, "step": tensors["step"]}


def restore(optimizer: torch.optim.Optimizer, master: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the optimizer state of a master weight from the result of `saved` or `in_float32`."""
    state = optimizer.state[master]
    step = tensors["step"]
    if hasattr(optimizer, "init_state"):  # bitsandbytes allocates its (paged) state by itself
        if not state:
            # It reads the parameter from its group, where ZeRO-3 puts parameters only during a step.
            group = optimizer.param_groups[0]
            held, group["params"] = group["params"], [master]
            optimizer.init_state(group, master, 0, 0)
            group["params"] = held
        state["step"] = int(step)
        for name in tensors.keys() - {"step"}:
            _copy(tensors[name], state, name)
        return
    state["step"] = step.clone()  # AdamW keeps its count on the CPU
    state.update({name: tensors[name].to(master.device).view_as(master) for name in tensors.keys() - {"step"}})


def _copy(tensor: torch.Tensor, state: dict[str, Any], name: str) -> None:
    from bitsandbytes import functional

    if state[name].dtype is torch.uint8 and tensor.is_floating_point():
        number = name.removeprefix("state")
        codes, how = functional.quantize_blockwise(
            tensor.to(state[name].device), code=state[f"qmap{number}"], blocksize=BLOCK
        )
        state[f"absmax{number}"].copy_(how.absmax)
        tensor = codes
    state[name].copy_(tensor.view_as(state[name]))
