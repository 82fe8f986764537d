"""A merged model as one GGUF file: llama.cpp's own converter writes it, and transformers reads it back."""

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.shared.errors import FineloopError, UserError
from ray_jobs.base.architecture import auto_class
from ray_jobs.text import ollama
from ray_jobs.text.chat_format import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEEDED = "sentencepiece"
"""A package that llama.cpp's script imports only when it converts the vocabulary, minutes after its start."""
CONVERTERS = ("convert_hf_to_gguf.py", "llama-convert-hf-to-gguf")
"""Names of the converter: the script in a checkout of llama.cpp, and the command that its pyproject.toml installs."""
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
MAX_DIFFERENCE = 1e-6
"""Largest tolerated difference, as a share of a tensor's largest absolute value (at least 1): float32's rounding error
where a converter stores 1 + w in place of w."""
LOG_TAIL = 12  # lines of output shown from a converter that failed
ADDS_BOS = "tokenizer.ggml.add_bos_token"


@dataclass(frozen=True)
class Tensors:
    """Result of comparing the tensors of a file with those of the model that it was made from."""

    compared: int
    max_abs_difference: float


def converter(named: Path | None) -> list[str]:
    """The command line of the converter `named`; with None, of the first one found on PATH.

    Raises:
        UserError: there is no converter, or it cannot run here.
    """
    if named is None:
        found = next((Path(path) for name in CONVERTERS if (path := shutil.which(name))), None)
        if found is None:
            raise UserError(
                f"--gguf needs the converter of llama.cpp, and neither {' nor '.join(CONVERTERS)} is on PATH: clone "
                f"https://github.com/ggml-org/llama.cpp, run `pip install {NEEDED}`, and name the script with "
                "--converter llama.cpp/convert_hf_to_gguf.py"
            )
    elif not named.is_file():
        raise UserError(f"--converter {named}: there is no such file; name llama.cpp's {CONVERTERS[0]}")
    else:
        found = named.absolute()
    if found.suffix != ".py":
        return [str(found)]
    if importlib.util.find_spec(NEEDED) is None:
        raise UserError(f"{found.name} needs {NEEDED}, which is not installed here: pip install {NEEDED}")
    return [sys.executable, str(found)]  # run a script with this Python, which has torch and transformers


def convert(command: list[str], model: Path, file: Path, *, dtype: str, name: str) -> None:
    """Convert the transformers folder `model` to the GGUF `file`, with matrices stored in `dtype`.

    Raises:
        FineloopError: the converter failed, or wrote nothing.
    """
    arguments = [str(model), "--outfile", str(file), "--outtype", OUTTYPES[dtype], "--model-name", name]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode or not file.is_file():
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-LOG_TAIL:])
        raise FineloopError(f"{' '.join(command)} ended with {done.returncode} and wrote no GGUF:\n{tail}")


def fill(model: "PreTrainedModel", file: Path) -> Tensors:
    """Compare the file's tensors with those of the model that it was made from, then load them into the model.

    Raises:
        FineloopError: a tensor is missing, has another shape, or differs by more than MAX_DIFFERENCE.
        UserError: transformers cannot read a GGUF of such a model.
    """
    import torch

    found = _weights(model, file)
    largest = 0.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in found or found[name].shape != weight.shape:
                shape = tuple(found[name].shape) if name in found else "nothing"
                raise FineloopError(f"nothing is exported: the GGUF has {shape} for {name}, {tuple(weight.shape)}")
            difference = float((found[name] - weight.float()).abs().max())
            if not difference <= MAX_DIFFERENCE * max(1.0, float(weight.abs().max())):
                raise FineloopError(f"nothing is exported: {name} differs by {difference:.2g} in the GGUF")
            largest = max(largest, difference)
            weight.copy_(found[name])
    return Tensors(len(dict(model.named_parameters())), largest)


def _weights(model: "PreTrainedModel", file: Path) -> dict[str, Any]:
    """The file's tensors in float32, keyed by the model's parameter names."""
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
    return dict(read.named_parameters())


def write_modelfile(file: Path, chat: ChatFormat, title: str, system: str, context: int) -> list[str]:
    """Write Ollama's Modelfile beside the GGUF; `context` is in tokens.

    Returns warnings about what a Modelfile cannot express.
    """
    tokenizer = chat.tokenizer
    bos = tokenizer.bos_token if _adds_bos(file, chat) else None
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


def _adds_bos(file: Path, chat: ChatFormat) -> bool:
    """Whether llama.cpp prepends the beginning-of-sequence token to a text; where the file does not say, it follows the
    tokenizer."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field(ADDS_BOS)
    return chat.begins if field is None else bool(field.contents())
