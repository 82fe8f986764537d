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
from components.shared import machine
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

ALL_LINEAR = "all-linear"
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names that model configurations use for the number of experts in a layer."""
ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Names that architectures use for their routers: one part of a layer's dotted name."""


@dataclass(frozen=True)
class Targets:
    """The weights to adapt, as peft's configurations take them."""

    modules: str | list[str]
    parameters: list[str]
    """Fused expert parameters, by the last two parts of their names."""


def find(model: "PreTrainedModel", method: MethodConfig, *, base_reference: str) -> Targets:
    """Find the weights of a base, on any device, that `method` adapts.

    Raises:
        ConfigError: an adapter there could not be merged, peft does not support it, or the base would stay
            unquantised.
    """
    if method.row.base != "bf16" and (dense := left_dense(model)):
        kinds = " and ".join(dense)
        share = _share(model, {name: each for weights in dense.values() for name, each in weights.items()})
        raise ConfigError(
            f"method.base {method.row.base} quantises no {kinds}, and of {base_reference} they are {share:.0%}, which "
            "would stay in bfloat16: set method.base=bf16"
        )
    experts = experts_of(model)
    head = model.get_output_embeddings()
    reading_text = {id(module) for module in (head, *model.get_decoder().modules())}
    layers = {name: module for name, module in model.named_modules() if name}
    text = {name: module for name, module in layers.items() if id(module) in reading_text}
    linear = {name: module for name, module in text.items() if _is_linear(module) and module is not head}
    linear = {name: module for name, module in linear.items() if not name.endswith(read_by_the_model(model.config))}
    routers = {name for name in text if experts and not ROUTERS.isdisjoint(name.split("."))}
    wanted = method.target_modules
    if wanted == ALL_LINEAR:
        targets = Targets([name for name in linear if name not in routers], _short(experts))
    else:
        matched = _named(layers, wanted)
        if isinstance(wanted, list):
            _require_found(wanted, [*layers, *experts], base_reference)
        adapted = [name for name in matched if name in text]
        _require_mergeable(model, wanted, [layers[name] for name in adapted], base_reference)
        _require_plain(wanted, {name: layers[name] for name in adapted if name in routers}, base_reference)
        # As in the config, unless that would also match layers that never run.
        modules = adapted if adapted != matched else wanted
        parameters = _short(_named(experts, wanted))
        targets = Targets(modules if matched or not parameters else [], parameters)
    if targets.parameters:
        _require_lora(method, sorted({name.rpartition(".")[2] for name in linear.keys() - routers}), base_reference)
    return targets


def experts_of(model: "PreTrainedModel") -> dict[str, "nn.Parameter"]:
    """The fused expert parameters, each of shape (experts, ., .), by name."""
    text = model.config.get_text_config()
    counts = {getattr(text, name, None) for name in NUM_EXPERTS} - {None}
    shapes = ((name, parameter, _shape(parameter)) for name, parameter in model.named_parameters())
    return {name: parameter for name, parameter, shape in shapes if len(shape) == 3 and shape[0] in counts}


def left_dense(model: "PreTrainedModel") -> dict[str, dict[str, "nn.Parameter"]]:
    """The weights that bitsandbytes cannot quantise, grouped by kind.

    transformers replaces only layers of torch's own class (integrations/bitsandbytes.py, replace_with_bnb_linear).
    """
    found = {"fused experts": experts_of(model)}
    for name, module in model.get_decoder().named_modules():
        kind = type(module)
        if _is_linear(module) and kind.__module__ == type(model).__module__ and ROUTERS.isdisjoint(name.split(".")):
            found.setdefault(kind.__name__, {})[name] = module.weight
    return {kind: weights for kind, weights in found.items() if weights}


def _is_linear(module: "nn.Module") -> bool:
    """Whether peft's all-linear would select the module; true for quantised layers too."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


PATTERN_S, PATTERN_BYTES = 10.0, 128 * 2**20
"""Limits of time, and of memory beyond what the process has already, for matching a config's regular expression."""


@contextmanager
def _bounded() -> Iterator[None]:
    """Limit the code within to PATTERN_S and PATTERN_BYTES. Time is limited only in a process's main thread.

    Raises:
        TimeoutError: the code took longer.
        MemoryError: the code needs more memory.
    """

    def time_is_up(*_: Any) -> None:
        raise TimeoutError

    with machine.at_most(PATTERN_BYTES):
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

    Raises:
        ConfigError: the expression backtracks for too long.
    """
    if not isinstance(wanted, str):
        return [name for name in names if any(name == each or name.endswith(f".{each}") for each in wanted)]
    pattern = re.compile(wanted)
    try:
        with _bounded():
            return [name for name in names if pattern.fullmatch(name)]
    except (TimeoutError, MemoryError, RecursionError) as exc:
        raise ConfigError(
            f"method.target_modules {wanted!r} does not come to an end in {PATTERN_S:.0f} s: write it without a "
            "repetition within a repetition"
        ) from exc


def _short(names: Iterable[str]) -> list[str]:
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def _share(model: "PreTrainedModel", experts: dict[str, "nn.Parameter"]) -> float:
    return sum(each.numel() for each in experts.values()) / sum(each.numel() for each in model.parameters())


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties sharded parameters


def _require_mergeable(
    model: "PreTrainedModel", wanted: str | list[str], adapted: list["nn.Module"], base_reference: str
) -> None:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embeddings.weight and any(module is head or module is embeddings for module in adapted):
        raise ConfigError(
            f"method.target_modules {wanted!r} reaches the output head or the input embeddings, which are one weight "
            f"in {base_reference}: an adapter of one of them could never be merged. Leave both out"
        )


def _require_found(wanted: list[str], names: list[str], base_reference: str) -> None:
    if missing := [each for each in wanted if not _named(names, [each])]:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()}))
        raise ConfigError(
            f"method.target_modules {missing!r} fits no layer of {base_reference}, whose layers are called {there}"
        )


def _require_plain(wanted: str | list[str], routers: dict[str, "nn.Module"], base_reference: str) -> None:
    from torch import nn

    for name, module in routers.items():
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            raise ConfigError(
                f"method.target_modules {wanted!r} names {name} of {base_reference}, a {type(module).__name__}, which "
                "gives more than a layer's output: no adapter fits around it. Leave it out"
            )


def _require_lora(method: MethodConfig, others: list[str], base_reference: str) -> None:
    if method.row.adapter != "lora":
        raise ConfigError(
            f"method.adapter {method.row.adapter} has no form for the experts of {base_reference}, each layer's one "
            f"parameter of three dimensions: set method.adapter=lora, or adapt the other layers alone with "
            f"method.target_modules={others}"
        )
    if method.dropout:
        raise ConfigError(
            f"method.dropout {method.dropout:g} cannot be applied to the experts of {base_reference}, whose adapter is "
            f"added to their weights before the input is seen: set method.dropout=0, or adapt the other layers alone "
            f"with method.target_modules={others}"
        )


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
