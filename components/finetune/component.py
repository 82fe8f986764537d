"""Kubeflow step: a Ray job trains the adapter and publishes it as a version."""

from kfp import dsl
from kfp.dsl import Model, Output

from components.shared.step import COMPONENT


@dsl.component(**COMPONENT)
def finetune(config: str, run_id: str, dataset_uri: str, adapter: Output[Model]) -> str:
    """Fine-tune on the dataset and return the version's URI."""
    import json
    from pathlib import Path

    from components.finetune.finetune import finetune as train
    from components.shared.step import step

    with step("finetune", config, run_id) as run:
        version_uri = train(run, dataset_uri=dataset_uri)
        # The weights stay in the registry: the artifact only says where, so that no later step downloads them.
        adapter.metadata.update(name=run.config.adapter.name, version_uri=version_uri)
        Path(adapter.path).write_text(json.dumps(run.result, indent=2))
    return version_uri
