"""Evaluation and chat against transformers and peft as they come, as ratios: `make bench`.

Both sides answer the same held-out records of the example with the same LoRA adapter, in turn, each in a process of its
own with the same threads, on a base that is stored in NF4. Evaluation is the loss of each reference answer and the
greedy answer; the plain loop takes batches of 32 records of like length. Chat is one prompt with an answer of a fixed
length, by the base and by the adapter: the time to its first word, and tokens/s after that.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import baselines, example

SIDES = ("fineloop", "plain")
TAUGHT = 480
"""Records that the adapter learns from, in one epoch: enough for it to answer with chapters."""
BATCH = 32
MAX_NEW_TOKENS = 16
CHAT_TOKENS = 64
PROMPT = "Tell me in a few sentences what the flu is."


def main() -> None:
    parser = example.parser("inference", __doc__, threads=os.cpu_count() or 1, rounds=2, record=True)
    parser.add_argument("--records", type=int, default=120)
    parser.add_argument("--side", choices=(*SIDES, "teach"), help="do this alone, and print its figures as JSON")
    parser.add_argument("--adapter", type=Path, help="with --side: its folder")
    options = parser.parse_args()
    if options.side:
        print(json.dumps({"fineloop": _fineloop, "plain": _plain, "teach": _teach}[options.side](options)))
        return
    with tempfile.TemporaryDirectory(prefix="fineloop-bench-") as scratch:
        options.adapter = Path(scratch)
        _in_a_process("teach", options)
        runs = _measured(options)
    for name, ratio in _compared(runs).items():
        print(baselines.compared(name, ratio, record=options.record))


def _measured(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    print(f"{options.records} held-out records, {options.threads} threads", flush=True)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            figures = _in_a_process(side, options)
            found[side].append(figures)
            chats = "   ".join(
                f"{who} {figures[who]['tokens_per_s']:.1f} tokens/s after {figures[who]['first_s']:.2f} s"
                for who in ("base", "adapter")
            )
            print(f"{side:>9}  {len(figures['nll']) / figures['seconds']:5.1f} records/s   {chats}", flush=True)
    return found


def _compared(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The ratios, by name; tells them, and what both sides found."""
    ours, theirs = (min(found[side], key=lambda run: run["seconds"]) for side in SIDES)
    equal = sum(one == other for one, other in zip(ours["answers"], theirs["answers"], strict=True))
    losses = [sum(each["nll"]) / sum(each["tokens"]) for each in (ours, theirs)]
    furthest = max(
        abs(one - other) / tokens for one, other, tokens in zip(ours["nll"], theirs["nll"], ours["tokens"], strict=True)
    )
    ratios = {"evaluation": theirs["seconds"] / ours["seconds"]}
    print(f"    ratio  evaluation {ratios['evaluation']:.2f} x as fast as transformers and peft")
    print(
        f"  answers  {equal} of {len(ours['answers'])} equal, {ours['exact_match']:.0%} and "
        f"{theirs['exact_match']:.0%} right; loss {losses[0]:.4f} and {losses[1]:.4f} nats a token, "
        f"of a record at most {furthest:.4f} apart"
    )
    for who in ("base", "adapter"):
        ours, theirs = (max((run[who] for run in found[side]), key=lambda run: run["tokens_per_s"]) for side in SIDES)
        ratios[f"chat {who}"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
        print(
            f"    ratio  chat {who} {ratios[f'chat {who}']:.2f} x the tokens/s, first word after "
            f"{ours['first_s'] / theirs['first_s']:.2f} x the time"
        )
    return ratios


def _in_a_process(side: str, options: argparse.Namespace) -> dict[str, Any]:
    chosen = ["--side", side, "--records", str(options.records), "--adapter", str(options.adapter)]
    return example.in_process("inference", chosen, threads=options.threads)


def _teach(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ray_jobs.adapters import build
    from ray_jobs.kernels import door
    from ray_jobs.text.answer_loss import answer_nll
    from ray_jobs.text.batching import collate, plan_epoch, tokenize

    config, base, chat, records, kernels = example.parts(options.threads)
    model = door.load_model(base, config.model, "nf4", kernels, use_gpu=False)
    adapted = kernels.adopt(build.attach(model, config.method, base_reference="bench", seed=0)).train()
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-3)
    split = tokenize(records[:TAUGHT], chat, config.model.max_length)
    for indices in plan_epoch(split.lengths, batch_size=16, group_by_length=True, seed=0, epoch=0):
        batch = collate(split, indices, chat.pad)
        loss = answer_nll(adapted, batch["input_ids"], batch["labels"]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    build.save(adapted, options.adapter)
    return {"loss": loss.item()}


def _evaluated(
    seconds: float, split: Any, records: Sequence[Any], nll: Sequence[float], answers: Sequence[str]
) -> dict[str, Any]:
    from ray_jobs.scoring.answers import exact_match

    right = [exact_match(answer, record.answer) for answer, record in zip(answers, records, strict=True)]
    return {
        "seconds": seconds,
        "nll": list(nll),
        "tokens": split.num_answer_tokens.tolist(),
        "answers": list(answers),
        "exact_match": sum(right) / len(right),
    }


def _chatted(answer: Callable[[Callable[[], None]], object]) -> dict[str, float]:
    """`answer` calls what it is given with each piece of its CHAT_TOKENS tokens."""
    first_word: list[float] = []
    started = time.perf_counter()
    answer(lambda: first_word.append(time.perf_counter()))
    return {"first_s": first_word[0] - started, "tokens_per_s": CHAT_TOKENS / (time.perf_counter() - started)}


def _fineloop(options: argparse.Namespace) -> dict[str, Any]:
    from components.prepare.dataset import Message, Record
    from ray_jobs.adapters import build
    from ray_jobs.kernels import door, one_row
    from ray_jobs.scoring.generation import greedy, score
    from ray_jobs.text.batching import tokenize

    config, base, chat, records, kernels = example.parts(options.threads)
    records = records[-options.records :]
    model = door.load_model(base, config.model, "nf4", kernels, use_gpu=False).eval()
    started = time.perf_counter()  # what evaluation does before it can begin counts
    kernels.hold_dense_if_room(model)
    adapted = kernels.adopt(build.load(model, options.adapter)).eval()
    split = tokenize(records, chat, config.model.max_length)
    scores = score(adapted, chat, records, split, batch_size=BATCH, max_new_tokens=MAX_NEW_TOKENS)
    seconds = time.perf_counter() - started
    figures = _evaluated(seconds, split, records, [each.nll for each in scores], [each.text for each in scores])
    prompt = tokenize([Record("prompt", [Message("user", PROMPT)], "-")], chat, config.model.max_length)
    endless = dataclasses.replace(chat, stops=frozenset({len(chat.tokenizer)}))
    one_row.adopt(adapted)  # as chat does

    def answer(first_word: Callable[[], None]) -> object:
        return greedy(adapted, endless, prompt, 1, CHAT_TOKENS, on_text=lambda _: first_word())

    with adapted.disable_adapter():
        base_figures = _chatted(answer)
    return {**figures, "base": base_figures, "adapter": _chatted(answer)}


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import DataCollatorForSeq2Seq, TextStreamer

    from benchmarks.peers.sides import measured
    from ray_jobs.kernels import float32_layers
    from ray_jobs.text.batching import tokenize

    config, base, chat, records, kernels = example.parts(options.threads)
    records = records[-options.records :]
    model = measured.base({"base": base.path, "dtype": "bfloat16", "gpu": False})
    started = time.perf_counter()
    model = PeftModel.from_pretrained(model, options.adapter).eval()
    if kernels.dtype == "float32":  # the same products for both, so that the loops are compared
        float32_layers.multiply_in_float32(model)
    tokenizer = chat.tokenizer
    split = tokenize(records, chat, config.model.max_length)
    rows = example.rows(split)
    prompts = [row["input_ids"][:length] for row, length in zip(rows, split.num_prompt_tokens.tolist(), strict=True)]
    collate = DataCollatorForSeq2Seq(tokenizer)
    nll, answers = [0.0] * len(rows), [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    greedily = {"do_sample": False, "eos_token_id": sorted(chat.stops), "pad_token_id": chat.pad}
    with torch.inference_mode():
        for indices in (order[start : start + BATCH] for start in range(0, len(order), BATCH)):
            batch = collate([rows[index] for index in indices])
            labels = batch.pop("labels")[:, 1:]
            losses = torch.nn.functional.cross_entropy(
                model(**batch).logits[:, :-1].float().transpose(1, 2), labels, reduction="none"
            )
            tokenizer.padding_side = "left"
            batch = tokenizer.pad({"input_ids": [prompts[index] for index in indices]}, return_tensors="pt")
            tokenizer.padding_side = "right"
            generated = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, **greedily)
            texts = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, loss, text in zip(indices, losses.sum(-1).tolist(), texts, strict=True):
                nll[index], answers[index] = loss, text.strip()
    figures = _evaluated(time.perf_counter() - started, split, records, nll, answers)
    turns = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")

    class Clock(TextStreamer):
        def __init__(self, first_word: Callable[[], None]) -> None:
            super().__init__(tokenizer, skip_prompt=True)
            self._told = first_word

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                self._told()

    def answer(first_word: Callable[[], None]) -> object:
        endless = {**greedily, "eos_token_id": len(tokenizer)}
        return model.generate(**prompt, max_new_tokens=CHAT_TOKENS, streamer=Clock(first_word), **endless)

    with model.disable_adapter():
        base_figures = _chatted(answer)
    return {**figures, "base": base_figures, "adapter": _chatted(answer)}


if __name__ == "__main__":
    main()
