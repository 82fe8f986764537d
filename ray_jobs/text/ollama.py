"""A Modelfile for Ollama: the chat template as Ollama's Go templates write it, stops, context and decoding.

Ollama does not run the template inside a GGUF. It looks for a similar one among some twenty of its own, and where none
is, it sends what was typed as it is (ollama v0.17: docs/template.mdx, template/template.go). So the template is found
out here by what it writes between turns, and written for Ollama.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

Prompt = Callable[[Sequence[Mapping[str, str]]], str]
Joints = Mapping[tuple[str, str], str]
"""What a template writes between a turn of one role and the next; "" stands for the beginning, and for the end."""
ALONE = (("user",), ("user", "assistant", "user"), ("user", "assistant", "user", "assistant", "user"))
WITH_SYSTEM = (("system", "user"), ("system", "user", "assistant", "user"))
USUAL_CONTEXT = 4096
"""Tokens that Ollama keeps on small machines, where nothing says how many (docs/context-length.mdx)."""
QUOTES = '"""'


def joints(prompt: Prompt, bos: str) -> Joints | None:
    """What the template writes around turns, where `prompt` gives the text that a model is to go on with.

    `bos` is left out at the beginning, for whoever reads the file puts it there. None where the text around a turn
    depends on more than its role and the role before it. Without system turns where it refuses or loses them.
    """
    found = _joints(prompt, ALONE, bos)
    return None if found is None else _joints(prompt, ALONE + WITH_SYSTEM, bos) or found


def _joints(prompt: Prompt, conversations: Sequence[Sequence[str]], bos: str) -> Joints | None:
    found: dict[tuple[str, str], str] = {}
    for roles in conversations:
        texts = [f"0xTEXT{place}x" for place in range(len(roles))]
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        shown = prompt(turns).removeprefix(bos)
        pieces = re.split("0xTEXT[0-9]x", shown)
        if re.findall("0xTEXT[0-9]x", shown) != texts:
            return None
        for pair, piece in zip(pairwise(["", *roles, ""]), pieces, strict=True):
            if found.setdefault(pair, piece) != piece:
                return None
    return found


def go_template(joints: Joints) -> str:
    """The template in Go, over the messages as Ollama gives them: never two of one role in a row."""

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
    """The Modelfile beside the file `gguf`, for greedy answers, as evaluation's are. `context` is in tokens."""
    lines = [f"# {title}", f"FROM ./{gguf}"]
    lines += [f"TEMPLATE {QUOTES}{template}{QUOTES}"] if template else []
    lines += [f"SYSTEM {QUOTES}{system}{QUOTES}"] if system else []
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {context}"]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, ""])
