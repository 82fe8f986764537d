"""A packed forward and backward pass on an accelerator that is not there, in a process of its own.

PyTorch lets Python stand in for a device (the key PrivateUse1), and fake tensors on it hold nothing: but each operation
refuses operands on two devices, as CUDA's do. So a table left on the CPU is found on a machine without GPUs.

    python -m tests.models.accelerator        prints where each gradient is
"""

import json

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM

from ray_jobs.base import attention
from ray_jobs.kernels import fused
from ray_jobs.text import answer_loss
from tests.models import zoo

NAME = "absent"


def move(model: nn.Module, device: torch.device) -> None:
    """From the meta device to fake tensors on `device`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(there, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def gradients() -> dict[str, str]:
    """The device of each factor's gradient."""
    _setup_privateuseone_for_python_backend(NAME)
    device, packing = torch.device(NAME, 0), answer_loss.Packing(common=12, rests=(9, 5, 14, 6))
    mask = packing.mask()
    attention.register(attention.RECORDS)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            zoo.KINDS["Llama, tied"].config(), attn_implementation=attention.RECORDS, dtype=torch.bfloat16
        )
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).bfloat16()
    fused.adopt(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(model, device)

        def there(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

        hidden = base.get_decoder()(
            input_ids=there(packing.positions),
            position_ids=there(packing.positions),
            attention_mask=there(mask),
            packing=packing,
            use_cache=False,
        ).last_hidden_state
        hidden.sum().backward()
    return {name: str(each.grad.device) for name, each in model.named_parameters() if each.grad is not None}


if __name__ == "__main__":
    print(json.dumps(gradients()))
