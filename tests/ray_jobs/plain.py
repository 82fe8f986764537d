"""An adapter as anybody would load and ask it: by plain transformers and peft, a record at a time, in float32."""

import json
from importlib import resources
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.config.schema import RunConfig
from components.prepare.dataset import Record
from components.registry.versions import Version, pull_version
from components.store.store import Store
from tests.models.tiny_version import publish, randomise

TIE = 0.06
"""Difference of two logits below which bfloat16 may choose the other token."""


def published(config: RunConfig, store: Store, directory: Path, *, seed: int) -> Version:
    """A version whose update is drawn at random."""
    scratch = directory / f"seed-{seed}"
    return publish(config, store, scratch, with_data=False, change=lambda adapted: randomise(adapted, seed=seed))


class Plain:
    """A model on its base, as anybody would load and ask it."""

    def __init__(self, base: Path | str, adapter: Path | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
        if adapter:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()

    def tokens(self, record: Record) -> list[torch.Tensor]:
        """Of its prompt, and of its answer."""
        turns = [{"role": turn.role, "content": turn.content} for turn in record.prompt]
        prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        texts = (prompt, record.answer + self.tokenizer.eos_token)
        return [self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0] for text in texts]

    @torch.inference_mode()
    def nll(self, record: Record, *, prompt_of: Record | None = None) -> float:
        prompt, answer = self.tokens(prompt_of or record)[0], self.tokens(record)[1]
        logits = self.model(input_ids=torch.cat([prompt, answer])[None]).logits[0]
        predicted = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return -predicted.gather(1, answer[:, None]).sum().item()

    @torch.inference_mode()
    def answer(self, record: Record, max_new_tokens: int) -> tuple[str, int, bool]:
        """The greedy answer up to its first near tie, where bfloat16 may go another way.

        Also its number of tokens, and whether that is all of it.
        """
        prompt = self.tokens(record)[0][None]
        out = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best_two = torch.cat(out.logits).topk(2).values
        ties = (best_two[:, 0] - best_two[:, 1] < TIE).nonzero().flatten().tolist()
        sure = ties[0] if ties else len(out.logits)
        text = self.tokenizer.decode(out.sequences[0, prompt.shape[1] :][:sure]).removesuffix(self.tokenizer.eos_token)
        text = text.lstrip().rstrip("\ufffd") if ties else text.strip()  # it may end within a character
        return text, sure, not ties


@torch.inference_mode()
def passage_losses(base: Path | str, max_length: int, count: int) -> list[float]:
    """The base's loss over the tokens of each passage of general text, by transformers' own sum."""
    text = resources.files("ray_jobs.probes").joinpath("general_text.json").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    passages = [passage["text"] for passage in json.loads(text)["passages"][:count]]
    tokens = [tokenizer(passage, return_tensors="pt").input_ids[:, :max_length] for passage in passages]
    return [model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in tokens]


def plain_of(config: RunConfig, store: Store, version: Version, directory: Path) -> Plain:
    pull_version(store, version, directory / version.version)
    return Plain(config.model.base, directory / version.version)
