"""vLLM's offline engine, as far as the evaluation asks it, over transformers and peft; and a Python that has it.

After vllm 0.32.0: vllm/entrypoints/llm.py, vllm/sampling_params.py, vllm/lora/peft_helper.py and vllm/config/lora.py.
"""

import json
import os
import runpy
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests import warm
from tests.doubles.vllm import LoRARequest

ROOT = Path(__file__).parents[2]
ERRS = "VLLM_DOUBLE_ERRS"
"""The variable that, if set, makes the first answer to each call end before its time."""
HANGS = "VLLM_DOUBLE_HANGS"
"""The variable with a file, if set: an engine writes its process's number there, and never starts."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass
class SamplingParams:
    """Its defaults; temperature 0 is greedy."""

    temperature: float = 1.0
    max_tokens: int | None = 16
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    detokenize: bool = True


class LLM:
    """The engine in the process."""

    def __init__(
        self,
        model: str = "",
        *,
        skip_tokenizer_init: bool = False,
        generation_config: str = "auto",
        trust_remote_code: bool = False,
        dtype: str = "auto",
        quantization: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        enable_lora: bool = False,
        max_lora_rank: int = 16,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if file := os.environ.get(HANGS):
            Path(file).write_text(str(os.getpid()))
            signal.pause()
        assert skip_tokenizer_init
        assert generation_config == "vllm"
        assert max_lora_rank in RANKS
        if quantization is not None:
            raise ValueError(f"{quantization} quantization is currently not supported in cpu.")
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        reach = self._model.config.max_position_embeddings
        if max_model_len is not None and max_model_len > reach:
            raise ValueError(f"User-specified max_model_len ({max_model_len}) is greater than {reach}")
        self._length, self._max_rank = max_model_len or reach, max_lora_rank if enable_lora else 0

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: SamplingParams,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[Any]:
        """Greedy answers to tokens, with their stop tokens."""
        model = self._adapted(lora_request.lora_path) if lora_request else self._model
        answers = [self._greedy(model, prompt["prompt_token_ids"], sampling_params) for prompt in prompts]
        if os.environ.get(ERRS):
            answers[0] = answers[0][:1]
        if lora_request:
            model.unload()
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer)]) for answer in answers]

    def _adapted(self, folder: str) -> Any:
        from peft import PeftModel

        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        if config["use_dora"]:
            raise ValueError("vLLM does not yet support DoRA.")
        if config["r"] > self._max_rank:
            raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {self._max_rank}.")
        return PeftModel.from_pretrained(self._model, folder, autocast_adapter_dtype=False).eval()

    def _greedy(self, model: Any, prompt: list[int], how: SamplingParams) -> list[int]:
        import torch

        assert how.temperature == 0
        if len(prompt) >= self._length:
            raise ValueError(f"The decoder prompt (length {len(prompt)}) is longer than {self._length}")
        ends = {*how.stop_token_ids} | ({model.config.eos_token_id} if not how.ignore_eos else set())
        answer: list[int] = []
        with torch.inference_mode():
            while len(answer) < min(how.max_tokens or 16, self._length - len(prompt)):
                logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1]
                answer.append(int(logits.float().argmax()))
                if answer[-1] in ends:
                    break
        return answer


def python_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch, *, real: bool = False) -> None:
    """A Python that has this vLLM, named by FINELOOP_VLLM_PYTHON; a `real` one is the child of whoever starts it."""
    python = folder / "python-with-vllm"
    program = shlex.quote(sys.executable if real else os.environ[warm.VARIABLE])
    path = shlex.quote(str(ROOT))
    python.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {program} -m tests.doubles.vllm_llm "$@"\n')
    python.chmod(0o700)
    monkeypatch.setenv("FINELOOP_VLLM_PYTHON", str(python))


def run() -> None:
    """Run what this process was called with, `-I -c CODE` or `-I FILE ARGUMENTS`, among vLLM's modules."""
    parts = {"vllm": (LLM, SamplingParams), "vllm.lora": (), "vllm.lora.request": (LoRARequest,)}
    for name, classes in parts.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update({part.__name__: part for part in classes})
    isolated, file, *arguments = sys.argv[1:]
    assert isolated == "-I"
    if file == "-c":
        exec(arguments[0])
    else:
        sys.argv = [file, *arguments]
        runpy.run_path(file, run_name="__main__")


if __name__ == "__main__":
    run()
