"""What a published version holds beside its adapter: the tokenizer and the chat template that it was trained with."""

import shutil
from datetime import UTC, datetime

import pytest
import torch
from transformers import AutoTokenizer

from components.config import config_file
from components.registry import lineage
from components.registry.versions import pull_version, read_lineage
from ray_jobs.base import base_model
from ray_jobs.training import publishing, worker
from ray_jobs.training.checkpoint import TrainingProgress
from ray_jobs.training.train_loop import TrainedAdapter
from ray_jobs.training.zero import Worker
from tests.models import chat_families
from tests.models.chat_families import FAMILIES
from tests.models.spec import spec_of


def published(config, store, base):
    adapted = worker.assemble(config, base, use_gpu=False)
    one = Worker(0, 1, torch.device("cpu"))
    recipe = publishing.recipe_of(config, adapted, base, base, one)
    spec = spec_of(config, run_id="", base=lineage.Base(config.model.base, base.identity))
    outcome = TrainedAdapter({}, TrainingProgress(config.digest, 1, step=1), stopped_early=False)
    return publishing.publish(
        spec, store, publishing.Fitted(adapted, outcome, recipe, base), one, started_at=datetime.now(UTC)
    )


@pytest.mark.parametrize(("name", "template_from"), [("none", "fineloop"), ("gemma", "base")])
def test_a_version_holds_what_it_was_asked_with(config, store, tmp_path, name, template_from):
    folder = chat_families.build(tmp_path / "base", FAMILIES[name])
    place = [f"model.base={folder}", f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}"]
    config = config_file.loads(config_file.dumps(config), place)
    version = published(config, store, base_model.resolve(config.model))
    shutil.rmtree(folder)  # a server has the adapter's folder alone
    pull_version(store, version, tmp_path / "pulled")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pulled")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "sky"}], tokenize=False)
    assert asked == {"none": "<s>sky\n\n", "gemma": "<bos><start_of_turn>user\nsky<end_of_turn>\n"}[name]
    assert read_lineage(store, version)["recipe"]["chat"]["template_from"] == template_from
    assert "| Chat template | " in (tmp_path / "pulled" / "README.md").read_text()
