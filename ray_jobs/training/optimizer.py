"""AdamW as `train.optimizer` names it, and its state in a checkpoint.

adamw              torch's: float32 masters and two moments in float32, 12 bytes a parameter with the master
adamw_8bit         bitsandbytes': the moments in 8 bits, blocks of 256 with a float32 scale each (arXiv:2110.02861)
paged_adamw_8bit   the same in CUDA's unified memory, which may leave the GPU while it is needed for something else
                   (arXiv:2305.14314, section 3)

The masters are DeepSpeed's in every case.
"""

from collections.abc import Mapping
from typing import Any

import torch

from components.config.schema import TrainConfig
from ray_jobs.adapters import dora

# What bitsandbytes keeps beside its state: the code books of its two data types. The first has a sign.
CONSTANTS = ("qmap1", "qmap2")
BLOCK = 256


def make(model: torch.nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Of everything that is trained. Its learning rate is to be set before every step."""
    groups = _groups(model, train.weight_decay)
    if train.optimizer == "adamw":
        # On CPUs one pass over everything takes a third of the time; on GPUs it would count its steps there.
        is_on_cpu = all(each.device.type == "cpu" for group in groups for each in group["params"])
        return torch.optim.AdamW(groups, lr=0.0, fused=is_on_cpu or None)
    from bitsandbytes import optim

    kind = optim.AdamW8bit if train.optimizer == "adamw_8bit" else optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, lr=0.0)
    return optimizer


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Everything that is trained; magnitudes, where there are any, as a second group, which does not decay."""
    magnitudes = list(dora.magnitudes(model))
    held = {id(parameter) for parameter in magnitudes}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    groups = [(others, weight_decay), (magnitudes, 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def forget_steps(state: dict[str, Any]) -> None:
    """Let a parameter's first step be its first, where DeepSpeed has taken an empty one to make the state."""
    if "step" in state:
        state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0


def saved(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A parameter's state, to be written to a checkpoint; the step as float32."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and name != "step"}
    return {
        "step": torch.as_tensor(float(state["step"])),
        **{name: value for name, value in tensors.items() if name not in CONSTANTS},
    }


def in_float32(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state that was `saved`, flat, with a number for each element of its parameter, so that it can be cut anywhere.

    Of moments in 8 bits that is what they stand for; in other blocks they are rounded anew.
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
    """Put a parameter's state back, as `saved` or `in_float32` gave it."""
    state = optimizer.state[master]
    step = tensors["step"]
    if hasattr(optimizer, "init_state"):  # bitsandbytes', whose pages are its own to make
        if not state:
            # It looks the parameter up in its group, where ZeRO-3 puts one for its own step alone.
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
