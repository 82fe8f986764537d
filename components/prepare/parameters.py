"""The pipeline's parameters beside its config: what people change from run to run, each a field in the Kubeflow UI."""

import json

KEYS = {
    "adapter_name": "adapter.name",
    "base_model": "model.base",
    "data_source": "data.source",
    "method_name": "method.name",
    "rank": "method.rank",
    "learning_rate": "train.learning_rate",
    "epochs": "train.epochs",
    "num_workers": "ray.num_workers",
}
"""The config key that each parameter replaces. Empty and 0 replace nothing: a pipeline's parameter cannot be absent."""

ANYWAY = "train_without_new_data"


def overrides(*, train_without_new_data: bool = False, **parameters: str | float) -> dict[str, str]:
    """The overrides that the given parameters make, as `section.key=value` by the parameter's name."""
    # Text becomes a quoted TOML string; JSON strings are valid TOML strings.
    given = {
        name: f"{KEYS[name]}={json.dumps(value, ensure_ascii=False)}" for name, value in parameters.items() if value
    }
    if train_without_new_data:
        given[ANYWAY] = "data.min_new_records=0"
    return given
