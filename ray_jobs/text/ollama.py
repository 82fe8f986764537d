"""Writing a Modelfile for Ollama: the chat template as a Go template, stop strings, context length and decoding.

Ollama does not run the template inside a GGUF. It looks for a similar one among about twenty of its own, and if there
is none, sends the prompt without a template (ollama v0.17: docs/template.mdx, template/template.go). So this module
determines the text that the template writes between turns, and writes a Go template with it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

Prompt = Callable[[Sequence[Mapping[str, str]]], str]
Joints = Mapping[tuple[str, str], str]
"""Text that a template writes between a turn of one role and a turn of the next; "" means the beginning or the end."""
ALONE = (("user",), ("user", "assistant", "user"), ("user", "assistant", "user", "assistant", "user"))
WITH_SYSTEM = (("system", "user"), ("system", "user", "assistant", "user"))
USUAL_CONTEXT = 4096
"""Ollama's default context in tokens on small machines (docs/context-length.mdx)."""
QUOTES = '"""'


def joints(prompt: Prompt, bos: str) -> Joints | None:
    """Determine the text that the template writes around turns; `prompt` renders turns into the text to be continued.

    `bos` is removed from the beginning, as the program that reads the GGUF adds it. None where the text around a turn
    depends on more than its role and the previous role. Without system turns if the template refuses or drops them.
    """
    alone = _joints(prompt, ALONE, bos)
    return None if alone is None else _joints(prompt, ALONE + WITH_SYSTEM, bos) or alone


def _joints(prompt: Prompt, conversations: Sequence[Sequence[str]], bos: str) -> Joints | None:
    written: dict[tuple[str, str], str] = {}
    for roles in conversations:
        texts = [f"0xTEXT{place}x" for place in range(len(roles))]
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        shown = prompt(turns).removeprefix(bos)
        pieces = re.split("0xTEXT[0-9]x", shown)
        if re.findall("0xTEXT[0-9]x", shown) != texts:
            return None
        for pair, piece in zip(pairwise(["", *roles, ""]), pieces, strict=True):
            if written.setdefault(pair, piece) != piece:
                return None
    return written


def go_template(joints: Joints) -> str:
    """The template in Go, for messages as Ollama passes them: never two of the same role in a row."""

    def text(before: str, after: str) -> str:
        return f"{{{{ {json.dumps(joints[before, after], ensure_ascii=False)} }}}}"

    lines = [
        '{{- $last := "" }}',
        "{{- range .Messages }}",
        f'{{{{- if eq .Role "assistant" }}}}{text("user", "assistant")}',
    ]
    if ("", "system") in joints:
        lines += [f'{{{{- else if eq .Role "system" }}}}{text("", "system")}']
        lines += [f'{{{{- else if eq $last "system" }}}}{text("system", "user")}']
    lines += [
        f'{{{{- else if eq $last "assistant" }}}}{text("assistant", "user")}',
        f"{{{{- else }}}}{text('', 'user')}",
        "{{- end }}",
        "{{- .Content }}",
        "{{- $last = .Role }}",
        "{{- end }}",
        "{{-" + text("user", "")[2:],
    ]
    return "\n".join(lines)


def modelfile(gguf: str, *, title: str, template: str, system: str, stops: Sequence[str], context: int) -> str:
    """The Modelfile for the GGUF beside it, with greedy decoding as in evaluation. `context` is in tokens."""
    lines = [f"# {title}", f"FROM ./{gguf}"]
    lines += [f"TEMPLATE {QUOTES}{template}{QUOTES}"] if template else []
    lines += [f"SYSTEM {QUOTES}{system}{QUOTES}"] if system else []
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {context}"]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, ""])
