"""Converting adapters to plain LoRA, for servers that support nothing else.

rsLoRA   W + (alpha / sqrt(r)) B A          alpha' = alpha sqrt(r), so that alpha' / r is the same (arXiv:2312.03732)
VeRA     W + diag(b) B diag(d) A            A' = diag(d) A, B' = diag(b) B, scaling 1 (arXiv:2310.11454)
DoRA     m (W + s B A) / norm(W + s B A)    not a LoRA: the magnitude scales W too; `nearest_lora` is the closest
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.shared.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

Factors = tuple["torch.Tensor", "torch.Tensor"]
"""A (r, in) and B (out, r) of a layer's update."""

OVERSAMPLING = 16
POWER_ITERATIONS = 4


def is_plain(folder: Path) -> bool:
    """Whether the adapter in the folder is a LoRA with scaling alpha / r as it is."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config["peft_type"] == "LORA" and not config.get("use_dora") and not config.get("use_rslora")


def as_lora(adapted: "PeftModel") -> "PeftModel":
    """Convert an adapter to a plain LoRA that computes the same function, with scaling alpha / r; unloads `adapted`.

    Raises:
        UserError: no LoRA computes the same function, as with DoRA and DVoRA.
    """
    config = adapted.peft_config["default"]
    if config.peft_type == "VERA":
        return _rebuilt(adapted, rank=config.r, alpha=config.r, factors=_vera_factors)
    if config.peft_type != "LORA" or config.use_dora:
        raise UserError(
            "this adapter's magnitudes scale the base's own weights, so it is no LoRA: use --merged, or --approximate "
            "RANK for the nearest LoRA of that rank, with its error measured"
        )
    return _classic(adapted)


def nearest_lora(adapted: "PeftModel", *, rank: int) -> "PeftModel":
    """The LoRA of this rank nearest to each layer's update in the Frobenius norm; takes the base out of `adapted`.

    Computed with a randomised SVD (arXiv:0909.4061, algorithm 4.4) of the difference that merging makes to the weight.
    """
    import torch

    def factors(layer: Any) -> Factors:
        weight = layer.get_base_layer().weight
        before = weight.detach().clone()
        layer.merge(safe_merge=True)
        update = layer.get_base_layer().weight.detach() - before
        update = update.T if layer.fan_in_fan_out else update  # GPT-2's weights are (in, out)
        layer.get_base_layer().weight.data.copy_(before)  # subtracting the update would leave a rounding error
        layer.merged_adapters.clear()
        num_values = min(rank, *update.shape)
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(update, q=min(num_values + OVERSAMPLING, *update.shape), niter=POWER_ITERATIONS)
        root = s[:num_values].sqrt()
        a, b = update.new_zeros(rank, update.shape[1]), update.new_zeros(update.shape[0], rank)
        a[:num_values] = root[:, None] * v[:, :num_values].T
        b[:, :num_values] = u[:, :num_values] * root
        return a, b

    return _rebuilt(adapted, rank=rank, alpha=rank, factors=factors)


def _classic(adapted: "PeftModel") -> "PeftModel":
    """A plain LoRA with the same matrices, of layers and of experts, and each alpha converted for scaling alpha / r."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = adapted.peft_config["default"]
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)

    def alpha(own: float, rank: int) -> float:
        return own * math.sqrt(rank) if config.use_rslora else own

    plain = get_peft_model(
        adapted.unload(),
        LoraConfig(
            r=config.r,
            lora_alpha=alpha(config.lora_alpha, config.r),
            rank_pattern=config.rank_pattern,
            alpha_pattern={
                layer: alpha(own, config.rank_pattern.get(layer, config.r))
                for layer, own in config.alpha_pattern.items()
            },
            target_modules=config.target_modules,
            target_parameters=config.target_parameters,
            fan_in_fan_out=config.fan_in_fan_out,
            task_type="CAUSAL_LM",
        ),
    )
    plain.peft_config["default"].base_model_name_or_path = config.base_model_name_or_path
    set_peft_model_state_dict(plain, weights)
    return plain


def _rebuilt(adapted: "PeftModel", *, rank: int, alpha: float, factors: Callable[[Any], Factors]) -> "PeftModel":
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = adapted.peft_config["default"]
    found = {}
    with torch.no_grad():
        for name, layer in adapted.base_model.model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                found[name] = factors(layer)
    plain = get_peft_model(
        adapted.unload(),
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=config.target_modules,
            fan_in_fan_out=config.fan_in_fan_out,
            task_type="CAUSAL_LM",
        ),
    )
    plain.peft_config["default"].base_model_name_or_path = config.base_model_name_or_path
    for name, (a, b) in found.items():
        layer = plain.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return plain


def _vera_factors(layer: Any) -> Factors:
    from ray_jobs.adapters.dvora import lora_factors

    return lora_factors(layer, "default")
