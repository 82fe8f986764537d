"""LoftQ: a base whose NF4 weights are chosen together with the adapter's initial A and B (arXiv:2310.08659).

For one weight, W = Q + L R is approximated by alternating: Q in NF4, L R of rank r, which are the adapter's initial B
and A. All workers split the layers together; rank 0 writes the model folder.

Shapes: M rows and N columns of the weight, R rank, K columns of a trial basis. All arithmetic is float32.
"""

import gc
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from components.config.schema import MethodConfig, TrainingConfig
from components.shared.errors import ConfigError
from components.shared.protocol import say
from ray_jobs.adapters import build
from ray_jobs.base import base_model, four_bits, together
from ray_jobs.base.architecture import auto_class
from ray_jobs.base.base_model import Base

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FORMAT = 1  # version of the folder's layout and of the arithmetic: part of the base's identity
# Must match the settings that `base_model.load_model` quantises with.
NF4: dict[str, Any] = {
    "quant_type": "nf4",
    "blocksize": 64,
    "compress_statistics": True,
    "quant_storage": torch.bfloat16,
}


@dataclass(frozen=True)
class Split:
    """A weight that has been split. All tensors are on the CPU."""

    packed: dict[str, torch.Tensor]
    """Q as bitsandbytes serialises it: `weight` and the quantisation statistics."""
    left_MR: torch.Tensor
    right_RN: torch.Tensor
    """L and R in float32, balanced to similar norms, without the adapter's scaling."""
    weight_norm2: float
    nf4_norm2: float
    """Squared Frobenius norm of W - NF4(W), the error that QLoRA starts with."""
    loftq_norm2: float
    """Squared Frobenius norm of W - Q - L R, with L and R in bfloat16 as training holds them."""


def split(weight_MN: torch.Tensor, *, rank: int, steps: int, name: str) -> Split:
    """Alternate `steps` times between Q = NF4(W - L R) and L R = the best rank-`rank` fit of W - Q; keep the best pair.

    Runs on the weight's device. `name` seeds the random start, so every worker splits a layer in the same way.
    """
    weight_MN = weight_MN.float()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    num_trials = min(rank + 32, *weight_MN.shape)
    basis_NK = torch.randn(weight_MN.shape[1], num_trials, generator=generator).to(weight_MN.device)
    target_MN = weight_MN
    best: Split | None = None
    nf4_norm2 = 0.0
    for step in range(steps):
        packed, quantized_MN = quantize(target_MN)
        residual_MN = weight_MN - quantized_MN
        if step == 0:
            nf4_norm2 = _norm2(residual_MN)
        left_MR, right_RN, basis_NK = low_rank(residual_MN, rank, basis_NK, powers=1 if step else 4)
        loftq_norm2 = _norm2(residual_MN - left_MR.bfloat16().float() @ right_RN.bfloat16().float())
        if best is None or loftq_norm2 < best.loftq_norm2:
            best = Split(packed, left_MR.cpu(), right_RN.cpu(), _norm2(weight_MN), nf4_norm2, loftq_norm2)
        target_MN = weight_MN - left_MR @ right_RN
    assert best is not None
    return best


def quantize(weight_MN: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The weight in NF4, as `Split.packed` describes it, and its dequantised float32 values."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    four_bits.register()
    # bfloat16 first, as transformers loads a weight before quantising it; dequantisation returns to that dtype.
    stored = Params4bit(weight_MN.bfloat16(), requires_grad=False, **NF4).to(weight_MN.device)
    packed = {"weight": stored.data, **stored.quant_state.as_dict(packed=True)}
    dense_MN = dequantize_4bit(stored.data, stored.quant_state).float()
    return {key: tensor.cpu() for key, tensor in packed.items()}, dense_MN


def low_rank(
    matrix_MN: torch.Tensor, rank: int, start_NK: torch.Tensor, *, powers: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left and right factor of the best rank-`rank` fit, and their basis: a good start for a similar matrix.

    Randomised subspace iteration, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    basis_NK = start_NK
    for _ in range(powers + 1):
        basis_MK = torch.linalg.qr(matrix_MN @ basis_NK).Q
        basis_NK, triangle_KK = torch.linalg.qr(matrix_MN.T @ basis_MK)
    # matrix ~ basis_M triangle.T basis_N.T, so only the small triangular matrix needs an SVD
    u_KK, s_K, vh_KK = torch.linalg.svd(triangle_KK.T)
    roots_R = s_K[:rank].sqrt()
    left_MR = basis_MK @ (u_KK[:, :rank] * roots_R)
    right_RN = (roots_R[:, None] * vh_KK[:rank]) @ basis_NK.T
    beyond = rank - len(roots_R)  # the rank may exceed the matrix's own
    return pad(left_MR, (0, beyond)), pad(right_RN, (0, 0, 0, beyond)), basis_NK


def _norm2(matrix_MN: torch.Tensor) -> float:
    return matrix_MN.double().square().sum().item()


@dataclass(frozen=True)
class Layer:
    """A layer to split, and the location of its original weight."""

    size: int
    file: Path
    tensor: str

    def read(self, device: torch.device) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as file:
            weight: torch.Tensor = file.get_tensor(self.tensor)
        return weight.to(device)


def made_from(method: MethodConfig, original: Base) -> dict[str, Any]:
    """The inputs that determine Q, L and R, as JSON values; the adapter's scaling and alpha are not among them."""
    targets = method.target_modules
    return {
        "format": FORMAT,
        "original": original.identity,
        "target_modules": targets if isinstance(targets, str) else sorted(set(targets)),
        "rank": method.r,
        "steps": method.loftq_steps,
        "quantization": {setting: str(value) for setting, value in NF4.items()},
    }


def compute(
    config: TrainingConfig, original: Base, *, rank: int, num_workers: int, group: "ProcessGroup | None"
) -> dict[str, Split]:
    """Split every layer that gets an adapter, each on one of the workers; returns all splits on rank 0, none elsewhere.

    The result is bit-identical for any number of workers. Raises ConfigError: on every worker, as in `find_layers`.
    """
    layers = find_layers(config, original)
    device = torch.device("cuda", torch.cuda.current_device()) if config.ray.use_gpu else torch.device("cpu")
    parts = shares({name: layer.size for name, layer in layers.items()}, num_workers)
    mine: dict[str, Split] = {}
    said_at = time.monotonic()
    if rank == 0:
        say("finetune", f"LoftQ: splitting {len(layers)} weights into NF4 and rank {config.method.r}, once")
    for name in parts[rank]:
        weight = layers[name].read(device)
        mine[name] = split(weight, rank=config.method.r, steps=config.method.loftq_steps, name=name)
        if rank == 0 and time.monotonic() - said_at >= 5.0:
            said_at = time.monotonic()
            done, total = (sum(layers[layer].size for layer in names) for names in (mine, parts[0]))
            say("finetune", f"LoftQ: {done / total:.0%} of the weights")
    return mine if group is None else _gather(mine, parts, rank, group)


def find_layers(config: TrainingConfig, original: Base) -> dict[str, Layer]:
    """The layers that peft will adapt, by name, found on the meta device without loading a weight. Raises ConfigError:
    the base is quantised already, or training would not hold one of the layers in NF4."""
    from safetensors import safe_open
    from transformers import AutoConfig
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    trust = config.model.trust_remote_code
    model_config = AutoConfig.from_pretrained(original.path, trust_remote_code=trust)
    if getattr(model_config, "quantization_config", None):
        raise ConfigError(
            f"method.init loftq: model.base {original.reference} is quantised already: name the original that it was "
            "made from"
        )
    with torch.device("meta"):
        model = auto_class(model_config).from_config(model_config, trust_remote_code=trust)
    never_quantised = get_keys_to_not_convert(model)
    prefix = f"{model.base_model_prefix}."
    adapted = build.attach(model, config.method, base_reference=original.reference, seed=config.train.seed)
    files: dict[str, Path] = {}
    for path in sorted(original.path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    layers = {}
    for name in adapted.targeted_module_names:
        layer: Any = adapted.get_base_model().get_submodule(f"{name}.base_layer")
        tensor = f"{name}.weight"
        if tensor not in files:  # a checkpoint saved without the head has no such prefix
            tensor = tensor.removeprefix(prefix)
        why = ""
        if isinstance(layer, Conv1D):
            why = "is a Conv1D, whose weight lies the other way round from what LoftQ splits"
        elif not isinstance(layer, torch.nn.Linear) or not should_convert_module(name, never_quantised):
            why = "is not quantised, so there is nothing to make up for"
        elif tensor not in files:
            why = "has no tensor of this name"
        if why:
            raise ConfigError(
                f"method.init loftq: {name} of {original.reference} {why}: leave it out of method.target_modules, or "
                'set method.init="default"'
            )
        layers[name] = Layer(layer.in_features * layer.out_features, files[tensor], tensor)
    return layers


def shares(sizes: Mapping[str, int], num_workers: int) -> list[list[str]]:
    """Distribute layers over workers: each layer, largest first, goes to the worker with the smallest load so far."""
    names: list[list[str]] = [[] for _ in range(num_workers)]
    loads = [0] * num_workers
    for name in sorted(sizes, key=lambda layer: (-sizes[layer], layer)):
        least = loads.index(min(loads))
        names[least].append(name)
        loads[least] += sizes[name]
    return names


def lost_shares(splits: Mapping[str, Split]) -> dict[str, dict[str, float]]:
    """The relative Frobenius error of the weights with NF4 alone and with LoftQ, for each kind of layer. Raises
    ConfigError: for some kind LoftQ does not reduce the error."""
    kinds: dict[str, list[Split]] = {}
    for layer in sorted(splits):
        kinds.setdefault(layer.rpartition(".")[2], []).append(splits[layer])
    lost: dict[str, dict[str, float]] = {}
    for kind, members in kinds.items():
        weight, nf4, loftq = (
            sum(getattr(member, norm2) for member in members) ** 0.5
            for norm2 in ("weight_norm2", "nf4_norm2", "loftq_norm2")
        )
        if not loftq < nf4:
            raise ConfigError(
                f"LoftQ gains nothing on {kind}: of weights with norm {weight:.6g}, NF4 loses {nf4:.6g} and LoftQ "
                f"{loftq:.6g}, which must be less. Leave {kind} out of method.target_modules, or set "
                'method.init="default"'
            )
        lost[kind] = {"layers": len(members), "nf4": nf4 / weight, "loftq": loftq / weight}
    return lost


def write(
    config: TrainingConfig, original: Base, splits: Mapping[str, Split], folder: Path, init_path: Path
) -> dict[str, Any]:
    """Write the original in NF4, with the Q of each split as that layer's weight, and the adapter's initial weights;
    returns the relative error in the weights' norm. The same splits give the same bytes."""
    from bitsandbytes.nn import Params4bit
    from safetensors.torch import save_file

    lost = lost_shares(splits)
    changes = ", ".join(f"{kind} {share['nf4']:.4f} -> {share['loftq']:.4f}" for kind, share in lost.items())
    say("finetune", f"LoftQ: share of the weights' norm that is lost, NF4 -> LoftQ: {changes}")
    model: Any = base_model.load_model(original, config.model, "nf4", use_gpu=config.ray.use_gpu, dtype=torch.bfloat16)
    for name, split in splits.items():
        layer = model.get_submodule(name)
        device, settings = layer.weight.device, {setting: getattr(layer.weight, setting) for setting in NF4}
        assert settings == NF4, f"load_model quantises with {settings}"
        statistics = dict(split.packed)
        data = statistics.pop("weight")
        layer.weight = Params4bit.from_prequantized(data, statistics, device=device, module=layer)
    model.save_pretrained(folder)
    del model, layer
    gc.collect()  # a 4-bit weight and its layer reference each other, and on a GPU the next model needs the memory
    init = {f"{name}.lora_A": split.right_RN for name, split in splits.items()}
    init |= {f"{name}.lora_B": split.left_MR for name, split in splits.items()}
    save_file({name: init[name].contiguous() for name in sorted(init)}, init_path)
    return {"lost_shares": lost}


def _gather(
    mine: dict[str, Split], parts: Sequence[Sequence[str]], rank: int, group: "ProcessGroup"
) -> dict[str, Split]:
    """Gather every worker's splits on rank 0, one layer at a time."""
    gathered = dict(mine) if rank == 0 else {}
    for owner in range(1, len(parts)):
        for name in parts[owner]:
            if rank == owner:
                own = mine.pop(name)
                norms = torch.tensor([own.weight_norm2, own.nf4_norm2, own.loftq_norm2], dtype=torch.float64)
                factors = {"left_MR": own.left_MR.contiguous(), "right_RN": own.right_RN.contiguous()}
                together.send({**own.packed, **factors, "norms": norms}, 0, group)
            elif rank == 0:
                tensors = together.receive(owner, group)
                left_MR, right_RN, norms = (tensors.pop(key) for key in ("left_MR", "right_RN", "norms"))
                gathered[name] = Split(tensors, left_MR, right_RN, *norms.tolist())
    return gathered
