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
"""A package that llama.cpp's script imports when it comes to the vocabulary, minutes after its start."""
CONVERTERS = ("convert_hf_to_gguf.py", "llama-convert-hf-to-gguf")
"""In a checkout of llama.cpp, and where its pyproject.toml has been installed."""
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
MAX_DIFFERENCE = 1e-6
"""Of a tensor's largest value: what float32's rounding leaves where a converter stores 1 + w for w."""
LOG_TAIL = 12  # lines of a converter that failed
ADDS_BOS = "tokenizer.ggml.add_bos_token"


@dataclass(frozen=True)
class Tensors:
    """How the tensors of a file were found beside those that it was made from."""

    compared: int
    max_abs_difference: float


def converter(named: Path | None) -> list[str]:
    """The command of the converter that was named, or of the first on PATH.

    Raises:
        UserError: there is none, or it would not run here.
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
    return [sys.executable, str(found)]  # a script gets this Python, which has torch and transformers; else its own


def convert(command: list[str], model: Path, file: Path, *, dtype: str, name: str) -> None:
    """Write the transformers folder `model` as `file`, its matrices as `dtype`.

    Raises:
        FineloopError: the converter failed, or wrote nothing.
    """
    arguments = [str(model), "--outfile", str(file), "--outtype", OUTTYPES[dtype], "--model-name", name]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode or not file.is_file():
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-LOG_TAIL:])
        raise FineloopError(f"{' '.join(command)} ended with {done.returncode} and wrote no GGUF:\n{tail}")


def fill(model: "PreTrainedModel", file: Path) -> Tensors:
    """Give the model, which the file was made from, the file's tensors, after comparing them with its own.

    Raises:
        FineloopError: one lacks, has another shape, or differs by more than the file's type makes it.
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
    """The file's tensors in float32, by the model's names."""
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
    """Write Ollama's Modelfile beside the GGUF; returns warnings of what it cannot say. `context` is in tokens."""
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
    """Whether llama.cpp puts the beginning-of-sequence token before a text; where the file does not say, it does as the
    tokenizer does."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field(ADDS_BOS)
    return chat.begins if field is None else bool(field.contents())
