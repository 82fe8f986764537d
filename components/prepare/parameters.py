"""The pipeline's parameters beside its config: what a person in the Kubeflow UI changes without editing TOML."""

import json

KEYS = {
    "adapter_name": "adapter.name",
    "data_source": "data.source",
    "method_name": "method.name",
    "learning_rate": "train.learning_rate",
    "num_workers": "ray.num_workers",
}
"""Parameter to the key that it replaces. Empty and 0 replace nothing: a pipeline's parameter cannot be absent."""


def overrides(*, train_without_new_data: bool = False, **parameters: str | float) -> dict[str, str]:
    """What the parameters that were given set, as `section.key=value` by the parameter's name."""
    # Text as a quoted TOML string, which JSON's are.
    given = {
        name: f"{KEYS[name]}={json.dumps(value, ensure_ascii=False)}" for name, value in parameters.items() if value
    }
    if train_without_new_data:
        given["train_without_new_data"] = "data.min_new_records=0"
    return given
