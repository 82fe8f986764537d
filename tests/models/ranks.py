"""How large a training makes an update, by its rank."""

import numpy as np

from components.config import config_file
from tests.models.plain import plain_training


def relative_size(config_toml: str, rows: list[dict[str, str]]) -> float:
    """|s B A| / |W| over all layers that LoRA's kind adapts, after the training, in numpy on the float32 masters."""
    config = config_file.loads(config_toml)
    trained = plain_training(config_toml, rows)
    weights = updates = 0.0
    for name, A in trained.masters.items():
        if ".lora_A." in name:
            B = trained.masters[name.replace(".lora_A.", ".lora_B.")].double().numpy()
            layer = trained.model.get_submodule(name.partition(".lora_A.")[0])
            rank, alpha = len(A), layer.lora_alpha["default"]
            # alpha / r, or arXiv:2312.03732's alpha / sqrt(r)
            scaling = alpha / (np.sqrt(rank) if config.method.row.scaling == "rslora" else rank)
            weights += float(np.sum(layer.base_layer.weight.double().numpy() ** 2))
            updates += float(np.sum((scaling * B @ A.double().numpy()) ** 2))
    return float(np.sqrt(updates / weights))
