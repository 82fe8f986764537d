"""The README.md of a published version: a model card, with the front matter that model hubs read."""

from collections.abc import Mapping
from typing import Any

from components.config.schema import RunConfig
from components.handover.serve_manifest import recorded

HOW_SERVED = {
    "lora": "Servers of LoRA adapters load it as it is.",
    "lora-export": "Servers of LoRA adapters load what `fineloop adapters export --lora` makes of it.",
    "merged": "It is served merged into its base, by `fineloop adapters export --merged`.",
}
MEASURED = {
    "merge": "merged, against the adapter on the same weights, in float32",
    "saved": "this folder, against the adapter in float32 on the weights it was trained on",
    "rounded": "these weights, against the merge before it was rounded, both run in float32",
    "effect": "for comparison: the base without the adapter, against the adapter on it, in float32",
    "evaluated": "this folder, against the adapter as it was evaluated",
    "converted": "this adapter, against the one it was made from, in float32",
}


def model_card(config: RunConfig, lineage: Mapping[str, Any]) -> str:
    """The model card: what the adapter is, its base, how it was trained and how to load it. Markdown."""
    training, dataset, recipe = lineage["training"], lineage["dataset"], lineage["recipe"]
    identity = ", ".join(f"{key} `{value}`" for key, value in lineage["base"]["identity"].items())
    eval_loss = training["eval_loss"]
    share = recipe["trainable_share"]
    auto_class = recipe.get("auto_class", "AutoModelForCausalLM")
    trained = f"{recipe['trainable_parameters']:,} of {recipe['parameters']:,} ({share:.2%})"
    pace = f"{training['wall_s']:.0f} s on {training['world_size']} workers"
    effort = f"{training['steps']} steps, {training['tokens']:,} tokens, {pace}"
    return f"""---
library_name: peft
base_model: {config.model.base}
tags: [{recipe["adapter"]}, fineloop]
---

# {config.adapter.name}

A {config.method.name} adapter (rank {config.method.r}) for `{config.model.base}`, trained by Fineloop run
`{lineage["run_id"]}`. `lineage.json` beside this file holds the whole record, `manifest.json` the sha256 of every file.

| | |
|---|---|
| Base | `{config.model.base}` ({identity}), loaded as {recipe["base"]} |{_own_base(config, recipe)}{_chat(recipe)}
| Data | `{dataset["dataset_id"]}`: {dataset["train_records"]} records trained on, {dataset["eval_records"]} held out |
| Trained parameters | {trained} |
| Training | {effort} |
| Held-out loss | {f"{eval_loss:.4f} nats per answer token" if eval_loss is not None else "not measured"} |

```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained(BASE_FOLDER)  # {recipe.get("stands_on", config.model.base)}
model = PeftModel.from_pretrained(base, ADAPTER_FOLDER)
```

## Serving

{_serving(lineage)}
"""


def _own_base(config: RunConfig, recipe: Mapping[str, Any]) -> str:
    if config.method.row.init == "default":
        return ""
    return (
        f"\n| Stands on | `{recipe['stands_on']}`: weights that were chosen together with the adapter's start. "
        "It is wrong on any other base; `fineloop adapters pull --with-base` fetches both |"
    )


def _chat(recipe: Mapping[str, Any]) -> str:
    if "chat" not in recipe:
        return ""
    whose = "the base's own" if recipe["chat"]["template_from"] == "base" else "Fineloop's, as the base has none"
    switches = [f"`{name}={str(value).lower()}`" for name, value in recipe["chat"].get("template_kwargs", {}).items()]
    asked = f", to be asked with {' and '.join(switches)} (`chat_template_kwargs`)" if switches else ""
    stops = ", ".join(f"`{stop}`" for stop in recipe["chat"]["stops"])
    return f"\n| Chat template | {whose}, beside this file with the tokenizer{asked}. Answers end with {stops} |"


def _serving(lineage: Mapping[str, Any]) -> str:
    found = recorded(lineage)
    notes = [f"- {note[:1].upper()}{note[1:]}." for note in found.notes]
    return "\n".join([HOW_SERVED[found.servable_as], *(["", *notes] if notes else [])])


def export_card(config: RunConfig, record: Mapping[str, Any]) -> str:
    """The README.md of an exported folder: what it is, its source, and how far the two differ. Markdown."""
    base = record["base_model"]
    is_lora = record["form"] == "lora"
    read_by = {
        "merged": "a transformers model that needs no peft",
        "gguf": "a file for llama.cpp; Ollama takes it with `ollama create NAME -f Modelfile` in this folder",
    }
    what = (
        f"`{base['reference']}` with the adapter merged into its {record['base']} weights, saved as "
        f"{record['dtype']}: {read_by[record['form']]}."
        if not is_lora
        else f"{'The adapter' if record['exact'] else 'The nearest LoRA to the adapter, not the adapter itself,'} as "
        f"plain LoRA of rank {record['rank']}, for the base `{base['stands_on']}`."
    )
    parity = record["parity"]
    figures = [
        f"| {MEASURED[name]} | {found['argmax_agreement']:.2%} | {found['max_abs_logit_difference']:.3g} "
        f"| {found['mean_kl_nats']:.3g} |"
        for name, found in parity.items()
        if name in MEASURED
    ]
    library = {"merged": "transformers", "gguf": "gguf", "lora": "peft"}[record["form"]]
    front = {"library_name": library, "base_model": base["reference"]}
    return "\n".join(
        [
            "---",
            *(f"{key}: {value}" for key, value in front.items()),
            f"tags: [{record['form']}, fineloop]",
            "---",
            "",
            f"# {record['adapter']}",
            "",
            f"{what} Made from version `{record['version']}` ({config.method.name}, base trained on as "
            f"{base['format']}), manifest sha256 `{record['manifest_sha256']}`; `export.json` holds the record.",
            "",
            f"Compared on {parity['compared_on']}:",
            "",
            "| | same token | largest logit difference | mean KL, nats |",
            "|---|---|---|---|",
            *figures,
            "",
        ]
    )
