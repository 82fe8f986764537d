"""The README.md of a published version: a model card, with the front matter that model hubs read."""

from collections.abc import Mapping
from typing import Any

from components.shared.config import RunConfig


def model_card(config: RunConfig, lineage: Mapping[str, Any]) -> str:
    """What the adapter is, what it stands on, how it came to be and how to load it. Markdown."""
    training, dataset, recipe = lineage["training"], lineage["dataset"], lineage["recipe"]
    identity = ", ".join(f"{key} `{value}`" for key, value in lineage["base"]["identity"].items())
    eval_loss = training["eval_loss"]
    share = recipe["trainable_share"]
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
| Base | `{config.model.base}` ({identity}), loaded as {recipe["base"]} |
| Data | `{dataset["dataset_id"]}`: {dataset["train_records"]} records trained on, {dataset["eval_records"]} held out |
| Trained parameters | {trained} |
| Training | {effort} |
| Held-out loss | {f"{eval_loss:.4f} nats per answer token" if eval_loss is not None else "not measured"} |

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(BASE_FOLDER)  # {config.model.base}
model = PeftModel.from_pretrained(base, ADAPTER_FOLDER)
```
"""
