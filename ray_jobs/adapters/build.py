"""Building a peft model for a configured method, loading a saved adapter, and writing the files that are published."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from components.config.schema import MethodConfig
from components.shared.errors import ConfigError
from ray_jobs.adapters.targets import Targets, find

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

# Seed of VeRA's random matrices. Not the training seed: peft puts several adapters on one base only if their seeds
# agree.
PROJECTION_SEED = 0


def peft_config(method: MethodConfig, targets: Targets) -> "PeftConfig":
    """The peft configuration of a method."""
    from peft import LoraConfig, VeraConfig

    from ray_jobs.adapters.dvora import DvoraConfig

    if method.row.adapter in ("vera", "dvora"):
        config_class = VeraConfig if method.row.adapter == "vera" else DvoraConfig
        return config_class(
            r=method.r,
            vera_dropout=method.dropout,
            projection_prng_key=PROJECTION_SEED,
            save_projection=True,  # the seed reproduces the matrices only on the same PyTorch release
            target_modules=targets.modules,
            task_type="CAUSAL_LM",
        )
    return LoraConfig(
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.dropout,
        use_rslora=method.row.scaling == "rslora",
        use_dora=method.row.adapter == "dora",
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        task_type="CAUSAL_LM",
    )


def attach(
    model: "PreTrainedModel",
    method: MethodConfig,
    *,
    base_reference: str,
    seed: int,
) -> "PeftModel":
    """Add a fresh adapter to a frozen base. The same seed gives the same initial weights on every worker.

    Raises:
        ConfigError: `method.target_modules` matches no layer of this base, or a layer that the method cannot adapt.
    """
    import torch
    from peft import get_peft_model

    from ray_jobs.adapters import dora, dvora

    targets = find(model, method, base_reference=base_reference)
    torch.manual_seed(seed)
    try:
        with _either_way_round():
            adapted = get_peft_model(model, peft_config(method, targets))
    except (TypeError, ValueError) as exc:  # peft raises either for a layer of an unsupported type
        raise ConfigError(
            f"method.target_modules {method.target_modules!r} does not fit {base_reference}: {exc}"
        ) from exc
    dora.adopt(adapted)
    dora.start_at_the_norm(adapted)
    dvora.unify_dtype(adapted, model.dtype)
    # A name that readers of adapter_config.json can resolve, instead of a cache folder of this machine.
    adapted.peft_config["default"].base_model_name_or_path = base_reference
    return adapted


def above_full_rank(adapted: "PeftModel", rank: int) -> tuple[int, int]:
    """The number of layers whose full rank is below `rank`, and the lowest full rank of these (`rank` if none).

    There a LoRA has more parameters than the update needs.
    """
    from peft.tuners.lora import LoraLayer

    full = [min(each.in_features, each.out_features) for each in adapted.modules() if isinstance(each, LoraLayer)]
    below = [each for each in full if each < rank]
    return len(below), min(below, default=rank)


def to_training(adapted: "PeftModel", dtype: "torch.dtype") -> None:
    """Convert a fresh adapter for DeepSpeed: weights become 16-bit, and each magnitude its change from the start.

    `dora.settle` turns these changes back into magnitudes.
    """
    from ray_jobs.adapters import dora

    dora.train_as_change(adapted, dtype)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def load(base: "PreTrainedModel", folder: Path) -> "PeftModel":
    """Load a saved adapter of any method onto its base, for inference.

    Except for magnitudes, its weights have the base's dtype, as in training: peft would upcast 16-bit ones to float32.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from ray_jobs.adapters import dora, dvora  # importing dvora registers its method with peft

    with _either_way_round():
        adapted = PeftModel.from_pretrained(base, folder)
    dora.adopt(adapted)
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A.to(base.dtype)
            layer.lora_B.to(base.dtype)
    dvora.unify_dtype(adapted, base.dtype)
    return adapted


def save(model: "PeftModel", directory: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as `PeftModel.from_pretrained` reads them."""
    with warnings.catch_warnings():
        # peft looks the base up to see whether its vocabulary grew; here it never does.
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # peft's template; we publish our own model card
    # peft writes sets in hash order, which differs between processes; sorted, as a version is named after its files.
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "target_parameters"):
        if isinstance(config.get(key), list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _either_way_round() -> Iterator[None]:
    """Silence peft's warning that it corrects fan_in_fan_out: GPT-2's weights are (in, out), quantised (out, in)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        yield
