"""Merging an adapter into dense weights, and measuring whether two models give the same predictions.

A 4-bit or int8 base cannot take an update without being rounded again, and peft's merge into one is wrong on CPU. So
the update is added to the weights that the adapter was trained on, dequantised: W' = dequantise(Q), in float32.

Shapes: T tokens of a row, V entries of the vocabulary.
"""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.shared.errors import FineloopError, UserError
from ray_jobs.base.architecture import auto_class, from_config
from ray_jobs.text import ollama
from ray_jobs.text.chat_format import ChatFormat

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

MIN_ARGMAX_AGREEMENT = 0.999
MAX_MEAN_KL_NATS = 1e-6
"""Largest mean KL divergence that the summation order in float32 may cause; on SmolLM2-135M it is below 1e-9."""
POSITIONS_AT_ONCE = 512
"""Number of positions, padding included, that models compared with each other compute together."""
MOST_ROUNDED_AWAY = 0.1
"""Ratio of two mean KL divergences, of rounding and of the adapter on its base, above which users are warned."""


@dataclass(frozen=True)
class Agreement:
    """How alike two models' next-token distributions are, over every position of some rows."""

    positions: int
    argmax_agreement: float
    """Share of positions at which both models rank the same token first."""
    max_abs_logit_difference: float
    mean_kl_nats: float
    """Mean of KL(reference || other)."""

    @property
    def is_same(self) -> bool:
        return self.argmax_agreement >= MIN_ARGMAX_AGREEMENT and self.mean_kl_nats <= MAX_MEAN_KL_NATS

    def summary(self) -> str:
        return (
            f"{self.argmax_agreement:.2%} of {self.positions} positions agree, largest logit difference "
            f"{self.max_abs_logit_difference:.2g}, mean KL {self.mean_kl_nats:.2g} nats"
        )


def logits(model: Any, rows: Sequence["torch.Tensor"]) -> Iterator["torch.Tensor"]:
    """The logits (T, V) of each row of token ids (T,), on the CPU, in the dtype that the model gives them.

    Rows that follow each other run together, padded on the right, where a causal model sees nothing of it.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    done = 0
    while done < len(rows):
        batch = [rows[done]]
        while done + len(batch) < len(rows):
            longer = [*batch, rows[done + len(batch)]]
            if len(longer) * max(map(len, longer)) > POSITIONS_AT_ONCE:
                break
            batch = longer
        mask = pad_sequence([torch.ones_like(row) for row in batch], batch_first=True).to(model.device)
        ids = pad_sequence(batch, batch_first=True).to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=None if mask.all() else mask, use_cache=False).logits
        yield from (of_row[: len(row)].cpu() for of_row, row in zip(logits, batch, strict=True))
        done += len(batch)


def agreement(reference: Iterable["torch.Tensor"], other: Iterable["torch.Tensor"]) -> Agreement:
    """Compare logits (T, V), row by row, in float64."""
    positions, agreeing, largest, divergence = 0, 0, 0.0, 0.0
    for expected, actual in zip(reference, other, strict=True):
        expected, actual = expected.double(), actual.double()
        positions += len(expected)
        agreeing += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        largest = max(largest, float((expected - actual).abs().max()))
        log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
    return Agreement(positions, agreeing / positions, largest, divergence / positions)


def require_same(result: Agreement, what: str) -> None:
    """Raise FineloopError if a model differs from the adapter on its base by more than float32's rounding."""
    if not result.is_same:
        raise FineloopError(
            f"nothing is exported, for {what} does not say what the adapter on its base says: {result.summary()}; "
            f"at least {MIN_ARGMAX_AGREEMENT:.1%} must agree, with a mean KL of at most {MAX_MEAN_KL_NATS:g} nats"
        )


def rounding_warnings(dtype: str, rounded: Agreement, effect: Agreement) -> list[str]:
    """Warnings where rounding the weights undoes much of the adapter's `effect` on the base; empty otherwise."""
    lost, moved = rounded.mean_kl_nats, effect.mean_kl_nats
    if lost <= MOST_ROUNDED_AWAY * moved:
        return []
    finer = "float16 or float32" if dtype == "bfloat16" else "float32"
    return [
        f"rounding the weights to {dtype} moves the model by {lost:.2g} nats, and the adapter moves its base by "
        f"{moved:.2g}: save it with --dtype {finer}, or serve the adapter beside its base"
    ]


def dequantise_into(dense: "PreTrainedModel", quantised: "PreTrainedModel") -> None:
    """Copy the quantised model's dequantised weights, exactly, into a dense model of the same architecture."""
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    with torch.no_grad():
        for name, layer in quantised.named_modules():
            if isinstance(layer, Linear4bit | Linear8bitLt):
                same, weight = dense.get_submodule(name), dequantize_module_weight(layer)
                same.weight.copy_(weight.T if isinstance(same, Conv1D) else weight)  # quantised, it lies as others do


def unquantised(quantised: "PreTrainedModel") -> "PreTrainedModel":
    """A dense float32 model with the dequantised weights of a base that only exists quantised."""
    import copy

    import torch

    shape = copy.deepcopy(quantised.config)
    del shape.quantization_config
    attention = quantised.config._attn_implementation
    dense: PreTrainedModel = from_config(shape, dtype=torch.float32, attn_implementation=attention)
    shapes = {name: weight.shape for name, weight in dense.state_dict().items()}
    kept = {name: weight for name, weight in quantised.state_dict().items() if shapes.get(name) == weight.shape}
    dense.load_state_dict(kept, strict=False)
    dequantise_into(dense, quantised)
    return dense.requires_grad_(False).eval()


def merge(adapted: "PeftModel") -> "PreTrainedModel":
    """Merge the adapter's update into the weights of its dense base, layer by layer and in place; returns the base.
    Raises FineloopError: a merged weight is not finite."""
    try:
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except ValueError as exc:
        raise FineloopError(f"the adapter cannot be merged: {exc}") from exc
    return merged


def vocabulary_rows(vocab_size: int, *, count: int, length: int) -> Sequence["torch.Tensor"]:
    """Rows of random token ids, the same on every call: inputs to compare models on when the data is gone."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(vocab_size, (count, length), generator=generator))


# Converting adapters to plain LoRA, for servers that support nothing else.
#
# rsLoRA's alpha becomes alpha sqrt(r) (arXiv:2312.03732), VeRA's matrices diag(d) A and diag(b) B with scaling 1
# (arXiv:2310.11454); DoRA's magnitude scales W too, which no LoRA does.

Factors = tuple["torch.Tensor", "torch.Tensor"]
"""A (r, in) and B (out, r) of a layer's update."""


def is_plain(folder: Path) -> bool:
    """Whether the adapter in the folder is a LoRA with scaling alpha / r as it is."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config["peft_type"] == "LORA" and not config.get("use_dora") and not config.get("use_rslora")


def as_lora(adapted: "PeftModel") -> "PeftModel":
    """Convert an adapter to a plain LoRA that computes the same function, with scaling alpha / r; `adapted` is gone.
    Raises UserError: no LoRA computes the same function, as with DoRA and DVoRA."""
    from ray_jobs.adapters.dvora import lora_factors

    config = adapted.peft_config["default"]
    if config.peft_type == "VERA":
        return _rebuilt(adapted, rank=config.r, factors=lambda layer: lora_factors(layer, "default"))
    if config.peft_type != "LORA" or config.use_dora:
        raise UserError(
            "this adapter's magnitudes scale the base's own weights, so it is no LoRA: use --merged, or --approximate "
            "RANK for the nearest LoRA of that rank, with its error measured"
        )
    if config.use_rslora:  # the matrices stay, of layers and of experts, and so does the scaling
        ranks = config.rank_pattern
        config.lora_alpha *= math.sqrt(config.r)
        config.alpha_pattern = {
            layer: alpha * math.sqrt(ranks.get(layer, config.r)) for layer, alpha in config.alpha_pattern.items()
        }
        config.use_rslora = False
    return adapted


def nearest_lora(adapted: "PeftModel", *, rank: int) -> "PeftModel":
    """The LoRA of this rank nearest to each layer's update in the Frobenius norm; takes the base out of `adapted`.

    It is fitted to the difference that merging makes to the weight.
    """
    import torch

    from ray_jobs.adapters.loftq import low_rank

    def factors(layer: Any) -> Factors:
        weight = layer.get_base_layer().weight
        before = weight.detach().clone()
        layer.merge(safe_merge=True)
        update = layer.get_base_layer().weight.detach() - before
        update = update.T if layer.fan_in_fan_out else update  # GPT-2's weights are (in, out)
        layer.get_base_layer().weight.data.copy_(before)  # subtracting the update would leave a rounding error
        layer.merged_adapters.clear()
        num_trials, generator = min(rank + 32, *update.shape), torch.Generator().manual_seed(0)
        start = torch.randn(update.shape[1], num_trials, generator=generator).to(update)
        left, right, _ = low_rank(update, rank, start, powers=4)
        return right, left

    return _rebuilt(adapted, rank=rank, factors=factors)


def _rebuilt(adapted: "PeftModel", *, rank: int, factors: Callable[[Any], Factors]) -> "PeftModel":
    """A LoRA of scaling 1 on the base of `adapted`, of each layer's factors."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = adapted.peft_config["default"]
    update = {}
    with torch.no_grad():
        for name, layer in adapted.base_model.model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                update[name] = factors(layer)
    plain = get_peft_model(
        adapted.unload(),
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=config.target_modules,
            fan_in_fan_out=config.fan_in_fan_out,
            task_type="CAUSAL_LM",
        ),
    )
    plain.peft_config["default"].base_model_name_or_path = config.base_model_name_or_path
    for name, (a, b) in update.items():
        layer = plain.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return plain


# A merged model as one GGUF file: llama.cpp's own converter writes it, and transformers reads it back.

NEEDED = "sentencepiece"
"""llama.cpp's script imports it only when it converts the vocabulary, minutes after its start."""
CONVERTERS = ("convert_hf_to_gguf.py", "llama-convert-hf-to-gguf")
"""Names of the converter: the script in a checkout of llama.cpp, and the command that its pyproject.toml installs."""
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
MAX_DIFFERENCE = 1e-6
"""Largest tolerated difference, as a share of a tensor's largest absolute value (at least 1): float32's rounding error
where a converter stores 1 + w in place of w."""


def converter(named: Path | None) -> list[str]:
    """The command line of the converter `named`; with None, of the first one found on PATH. Raises UserError: there is
    no converter, or it cannot run here."""
    if named is None:
        program = next((Path(path) for name in CONVERTERS if (path := shutil.which(name))), None)
        if program is None:
            raise UserError(
                f"--gguf needs the converter of llama.cpp, and neither {' nor '.join(CONVERTERS)} is on PATH: clone "
                f"https://github.com/ggml-org/llama.cpp, run `pip install {NEEDED}`, and name the script with "
                "--converter llama.cpp/convert_hf_to_gguf.py"
            )
    elif not named.is_file():
        raise UserError(f"--converter {named}: there is no such file; name llama.cpp's {CONVERTERS[0]}")
    else:
        program = named.absolute()
    if program.suffix != ".py":
        return [str(program)]
    if importlib.util.find_spec(NEEDED) is None:
        raise UserError(f"{program.name} needs {NEEDED}, which is not installed here: pip install {NEEDED}")
    return [sys.executable, str(program)]  # run a script with this Python, which has torch and transformers


def convert_to_gguf(command: list[str], model: Path, file: Path, *, dtype: str, name: str) -> None:
    """Convert the transformers folder `model` to the GGUF `file`, with matrices stored in `dtype`. Raises
    FineloopError: the converter failed, or wrote nothing."""
    arguments = [str(model), "--outfile", str(file), "--outtype", OUTTYPES[dtype], "--model-name", name]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode or not file.is_file():
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-12:])
        raise FineloopError(f"{' '.join(command)} ended with {done.returncode} and wrote no GGUF:\n{tail}")


def fill(model: "PreTrainedModel", file: Path) -> dict[str, Any]:
    """Compare the file's tensors with those of the model that it was made from, then load them into the model.

    Returns how many were `compared`, and their `max_abs_difference`. Raises FineloopError where a tensor is missing,
    has another shape, or differs by more than MAX_DIFFERENCE.
    """
    import torch
    from transformers import GgufConfig

    how = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    try:
        read = auto_class(model.config).from_pretrained(file.parent, gguf_file=file.name, **how)
    except (ValueError, NotImplementedError) as exc:
        raise UserError(
            f"transformers cannot read a GGUF of a {model.config.model_type}, so that it cannot be checked ({exc}): "
            "export it with --merged, and convert that folder yourself"
        ) from exc
    stored, largest = dict(read.named_parameters()), 0.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in stored or stored[name].shape != weight.shape:
                shape = tuple(stored[name].shape) if name in stored else "nothing"
                raise FineloopError(f"nothing is exported: the GGUF has {shape} for {name}, {tuple(weight.shape)}")
            difference = float((stored[name] - weight.float()).abs().max())
            if not difference <= MAX_DIFFERENCE * max(1.0, float(weight.abs().max())):
                raise FineloopError(f"nothing is exported: {name} differs by {difference:.2g} in the GGUF")
            largest = max(largest, difference)
            weight.copy_(stored[name])
    return {"compared": len(dict(model.named_parameters())), "max_abs_difference": largest}


def write_modelfile(file: Path, chat: ChatFormat, title: str, system: str, context: int) -> list[str]:
    """Write Ollama's Modelfile beside the GGUF, `context` in tokens; returns warnings about what it cannot express."""
    from gguf import GGUFReader

    tokenizer = chat.tokenizer
    field = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    begins = chat.begins if field is None else bool(field.contents())  # as llama.cpp begins a text
    bos = tokenizer.bos_token if begins else None
    joints = ollama.joints(chat.prompt, bos or "")
    warnings = []
    if joints is None:
        warnings += [
            "the chat template writes turns in a way that Ollama's cannot be made from, and none is in the Modelfile: "
            "write its TEMPLATE by hand, or serve the file with llama.cpp's llama-server --jinja"
        ]
    if ollama.QUOTES in system:
        warnings += ["the system message has three quotes in a row, so the Modelfile is without it: send it yourself"]
        system = ""
    stops = tokenizer.convert_ids_to_tokens(sorted(chat.stops))
    template = ollama.go_template(joints) if joints else ""
    text = ollama.modelfile(file.name, title=title, template=template, system=system, stops=stops, context=context)
    file.with_name("Modelfile").write_text(text, encoding="utf-8")
    return warnings
