"""The pipeline's parameters beside its config: what people change from run to run, a field each in the Kubeflow UI."""

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
"""Parameter to the key that it replaces. Empty and 0 replace nothing: a pipeline's parameter cannot be absent."""

ANYWAY = "train_without_new_data"


def overrides(*, train_without_new_data: bool = False, **parameters: str | float) -> dict[str, str]:
    """What the parameters that were given set, as `section.key=value` by the parameter's name."""
    # Text as a quoted TOML string, which JSON's are.
    given = {
        name: f"{KEYS[name]}={json.dumps(value, ensure_ascii=False)}" for name, value in parameters.items() if value
    }
    if train_without_new_data:
        given[ANYWAY] = "data.min_new_records=0"
    return given
