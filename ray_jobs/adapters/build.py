"""Building a peft model for a configured method, loading a saved adapter, and writing the files that are published."""

import json
import re
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.schema import MethodConfig
from components.shared.errors import ConfigError
from ray_jobs.base.architecture import read_by_the_model

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


# Which weights of a base get an adapter, and which cannot.
#
# Only the text model is adapted: a vision tower never runs when training on text. In mixture-of-experts models
# transformers holds all experts of a layer in one three-dimensional parameter, which only LoRA can adapt (peft's
# target_parameters) and which bitsandbytes does not quantise. Routers are adapted only where the config names them.

ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Names that architectures use for their routers: one part of a layer's dotted name."""


@dataclass(frozen=True)
class Targets:
    """The weights to adapt, as peft's configurations take them."""

    modules: str | list[str]
    parameters: list[str]
    """Fused expert parameters, by the last two parts of their names."""


def find(model: "PreTrainedModel", method: MethodConfig, *, base_reference: str) -> Targets:
    """Find the weights of a base, on any device, that `method` adapts. Raises ConfigError: an adapter there could not
    be merged, peft does not support it, or the base would stay unquantised."""
    if method.row.base != "bf16" and (dense := left_dense(model)):
        weights = {name: weight for kind in dense.values() for name, weight in kind.items()}
        share = sum(weight.numel() for weight in weights.values()) / sum(
            weight.numel() for weight in model.parameters()
        )
        raise ConfigError(
            f"method.base {method.row.base} quantises no {' and '.join(dense)}, and of {base_reference} they are "
            f"{share:.0%}, which would stay in bfloat16: set method.base=bf16"
        )
    from torch import nn

    experts = experts_of(model)
    head = model.get_output_embeddings()
    reading_text = {id(module) for module in (head, *model.get_decoder().modules())}
    layers = {name: module for name, module in model.named_modules() if name}
    text = {name: module for name, module in layers.items() if id(module) in reading_text}
    linear = {name: module for name, module in text.items() if _is_linear(module) and module is not head}
    linear = {name: module for name, module in linear.items() if not name.endswith(read_by_the_model(model.config))}
    routers = {name for name in text if experts and not ROUTERS.isdisjoint(name.split("."))}
    wanted = method.target_modules
    if wanted == "all-linear":
        targets = Targets([name for name in linear if name not in routers], _short(experts))
    else:
        matched = _named(layers, wanted)
        every = [*layers, *experts]
        if missing := [name for name in wanted if not _named(every, [name])] if isinstance(wanted, list) else []:
            last_parts = {name.rpartition(".")[2] for name in every}
            raise ConfigError(
                f"method.target_modules {missing!r} fits no layer of {base_reference}, whose layers are called "
                f"{', '.join(sorted(part for part in last_parts if not part.isdigit()))}"
            )
        adapted = [name for name in matched if name in text]
        embeddings = model.get_input_embeddings()
        if head.weight is embeddings.weight and any(layers[name] in (head, embeddings) for name in adapted):
            raise ConfigError(
                f"method.target_modules {wanted!r} reaches the output head or the input embeddings, which are one "
                f"weight in {base_reference}: an adapter of one of them could never be merged. Leave both out"
            )
        for name in (name for name in adapted if name in routers):
            if isinstance(layers[name], nn.Linear) and type(layers[name]).forward is not nn.Linear.forward:
                raise ConfigError(
                    f"method.target_modules {wanted!r} names {name} of {base_reference}, a "
                    f"{type(layers[name]).__name__}, which gives more than a layer's output: no adapter fits around "
                    "it. Leave it out"
                )
        # As in the config, unless that would also match layers that never run.
        modules = adapted if adapted != matched else wanted
        parameters = _short(_named(experts, wanted))
        targets = Targets(modules if matched or not parameters else [], parameters)
    if targets.parameters and (method.row.adapter != "lora" or method.dropout):
        others = sorted({name.rpartition(".")[2] for name in linear.keys() - routers})
        what = f"the experts of {base_reference}, each layer's one parameter of three dimensions"
        problem, change = f"method.adapter {method.row.adapter} has no form for {what}", "method.adapter=lora"
        if method.row.adapter == "lora":  # which is added to their weights before the input is seen
            problem, change = f"method.dropout {method.dropout:g} cannot be applied to {what}", "method.dropout=0"
        raise ConfigError(
            f"{problem}: set {change}, or adapt the other layers alone with method.target_modules={others}"
        )
    return targets


def experts_of(model: "PreTrainedModel") -> dict[str, "nn.Parameter"]:
    """The fused expert parameters, each of shape (experts, ., .), by name."""
    text, names = model.config.get_text_config(), ("num_experts", "num_local_experts", "n_routed_experts")
    counts = {getattr(text, name, None) for name in (*names, "moe_num_experts")} - {None}
    experts = {}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties sharded parameters
        if len(shape) == 3 and shape[0] in counts:
            experts[name] = parameter
    return experts


def left_dense(model: "PreTrainedModel") -> dict[str, dict[str, "nn.Parameter"]]:
    """The weights that bitsandbytes cannot quantise, grouped by kind.

    transformers replaces only layers of torch's own class (integrations/bitsandbytes.py, replace_with_bnb_linear).
    """
    dense = {"fused experts": experts_of(model)}
    for name, module in model.get_decoder().named_modules():
        kind = type(module)
        if _is_linear(module) and kind.__module__ == type(model).__module__ and ROUTERS.isdisjoint(name.split(".")):
            dense.setdefault(kind.__name__, {})[name] = module.weight
    return {kind: weights for kind, weights in dense.items() if weights}


def _is_linear(module: "nn.Module") -> bool:
    """Whether peft's all-linear would select the module; true for quantised layers too."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


PATTERN_S = 10.0
"""Limit of time for matching a config's regular expression."""


@contextmanager
def _in_time() -> Iterator[None]:
    """Raise TimeoutError after PATTERN_S, in a process's main thread."""

    def time_is_up(*_: Any) -> None:
        raise TimeoutError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, time_is_up)
    signal.setitimer(signal.ITIMER_REAL, PATTERN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _named(names: Iterable[str], wanted: str | list[str]) -> list[str]:
    """The names that peft would match: a string is a regular expression for the whole name, a list holds name endings.
    Raises ConfigError: the expression backtracks for too long."""
    if not isinstance(wanted, str):
        return [name for name in names if any(name == ending or name.endswith(f".{ending}") for ending in wanted)]
    pattern = re.compile(wanted)
    try:
        with _in_time():
            return [name for name in names if pattern.fullmatch(name)]
    except (TimeoutError, RecursionError) as exc:
        raise ConfigError(
            f"method.target_modules {wanted!r} does not come to an end in {PATTERN_S:.0f} s: write it without a "
            "repetition within a repetition"
        ) from exc


def _short(names: Iterable[str]) -> list[str]:
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def peft_config(method: MethodConfig, targets: Targets) -> "PeftConfig":
    """The peft configuration of a method, whose start is peft's own unless it has a base of its own."""
    from peft import LoraConfig, VeraConfig

    from ray_jobs.adapters.dvora import DvoraConfig

    if method.row.adapter in ("vera", "dvora"):
        config_class = VeraConfig if method.row.adapter == "vera" else DvoraConfig
        return config_class(
            r=method.r,
            vera_dropout=method.dropout,
            projection_prng_key=0,  # not the training's seed: several adapters on one base must have the same
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


def attach(model: "PreTrainedModel", method: MethodConfig, *, base_reference: str, seed: int) -> "PeftModel":
    """Add a fresh adapter to a frozen base. The same seed gives the same initial weights on every worker. Raises
    ConfigError: `method.target_modules` matches no layer of this base, or a layer that the method cannot adapt."""
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

    full = [min(layer.in_features, layer.out_features) for layer in adapted.modules() if isinstance(layer, LoraLayer)]
    below = [full_rank for full_rank in full if full_rank < rank]
    return len(below), min(below, default=rank)


def to_training(adapted: "PeftModel", dtype: "torch.dtype") -> None:
    """Convert a fresh adapter for DeepSpeed: weights become 16-bit, and each magnitude its change from the start, until
    `dora.settle`."""
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
        model.save_pretrained(directory, save_embedding_layers=False)
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
