"""`fineloop adapters export`."""

import argparse
from pathlib import Path
from typing import Any

from pipelines.commands.arguments import Answer, add_command, add_config, add_home, print_err
from pipelines.commands.opened_registry import opened_registry

FORMS_OF = {"base": ("merged", "gguf"), "dtype": ("merged", "gguf"), "approximate": ("lora",), "converter": ("gguf",)}
"""The options that not every form has."""


def add(verbs: Any, *, reference: str) -> None:
    """Add the command to the group; `reference` says how a version is named."""
    export = add_command(
        verbs,
        "export",
        _export,
        does="Write a version merged into its base, as a folder or a GGUF, or as plain LoRA.",
        more="Before it is rounded to --dtype, the merged model must predict the same in float32 as the adapter on "
        "its base; otherwise nothing is written. The cost of rounding is measured on the folder: its exact match "
        "and loss on held-out records beside the adapter's, with a warning if it is more than a tenth of the "
        "adapter's effect. --gguf writes one file for llama.cpp with llama.cpp's converter, compares its tensors "
        "with the merged model's, and writes a Modelfile for Ollama beside it.",
        example="fineloop adapters export icd10-chapters@production --merged",
    )
    export.add_argument("reference", metavar="NAME[@ALIAS|@VERSION]", help=reference)
    form = export.add_mutually_exclusive_group(required=True)
    form.add_argument("--merged", action="store_const", dest="form", const="merged", help="a model that needs no peft")
    form.add_argument("--lora", action="store_const", dest="form", const="lora", help="plain LoRA, where it is one")
    form.add_argument("--gguf", action="store_const", dest="form", const="gguf", help="for llama.cpp and Ollama")
    export.add_argument("--to", type=Path, metavar="DIR", help="default: ./NAME-VERSION-merged, -lora or -gguf")
    export.add_argument(
        "--base",
        choices=("dequantised", "original"),
        help="with --merged or --gguf: into the weights that it was trained on, exactly (default), or into those from "
        "before quantising, with the error measured",
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="with --merged or --gguf: how the weights are saved (default: bfloat16, in a GGUF float16); float16 "
        "rounds eight times finer",
    )
    export.add_argument(
        "--approximate",
        type=_rank,
        metavar="RANK",
        help="with --lora: if it is not a LoRA, the nearest one of this rank, with the error measured",
    )
    export.add_argument(
        "--converter",
        type=Path,
        metavar="FILE",
        help="with --gguf: llama.cpp's convert_hf_to_gguf.py (default: the one on PATH)",
    )
    add_config(export)
    add_home(export)


def _export(options: argparse.Namespace) -> Answer:
    from components.registry.versions import resolve
    from pipelines.local.job import Job, answer

    chosen = _chosen(options)
    with opened_registry(options) as store:
        version = resolve(store, options.reference)
        target = (options.to or Path(f"{version.name}-{version.version}-{options.form}")).absolute()
        arguments = ["--version", f"{version.name}@{version.version}", "--form", options.form, "--to", str(target)]
        job = Job("ray_jobs.export", str(options.config.absolute()), [*arguments, *chosen], options.overrides)
        record = answer(job, on_line=print_err, verbose=options.verbose)
    keys = ("version", "form", "base", "dtype", "exact", "parity", "answers", "tensors", "warnings")
    return Answer({"path": str(target), **{key: record.get(key) for key in keys}})


def _chosen(options: argparse.Namespace) -> list[str]:
    """The options that were given, as the job takes them.

    Raises:
        UserError: one of them belongs to the other form.
    """
    from components.shared.errors import UserError

    given = {name: getattr(options, name) for name in FORMS_OF if getattr(options, name) is not None}
    for name in given:
        if options.form not in FORMS_OF[name]:
            forms = " or ".join(f"--{form}" for form in FORMS_OF[name])
            raise UserError(f"--{name} goes with {forms}, not with --{options.form}: remove one of the two")
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def _rank(text: str) -> int:
    rank = int(text)
    if rank < 1:
        raise argparse.ArgumentTypeError(f"a rank is at least 1, not {rank}")
    return rank
