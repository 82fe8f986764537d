"""Which process tokenises which records, by a tokenizer that notes what it is given."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.e2e.conftest import Tiny
from tests.models.tiny import colour_rows

pytestmark = [pytest.mark.e2e, pytest.mark.full]

NOTING = """
import json, sys
from transformers import PreTrainedTokenizerFast

class NotingTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text=None, *arguments, **how):
        texts = [text] if isinstance(text, str) else list(text)
        with open({log!r}, "a") as file:
            file.write(json.dumps([sys.orig_argv, texts]) + "\\n")
        return super().__call__(text, *arguments, **how)
"""


@pytest.fixture
def noted(tiny: Tiny, tmp_path: Path) -> tuple[Path, Path]:
    """The tiny base with such a tokenizer, and the file of its notes."""
    base, log = shutil.copytree(tiny.base, tmp_path / "noting"), tmp_path / "notes.jsonl"
    (base / "noting.py").write_text(NOTING.format(log=str(log)))
    path = base / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text())
    settings |= {"tokenizer_class": "NotingTokenizer", "auto_map": {"AutoTokenizer": [None, "noting.NotingTokenizer"]}}
    path.write_text(json.dumps(settings))
    return base, log


def test_drivers_of_a_run_a_retraining_and_a_sweep_tokenise_and_workers_only_what_they_measure(
    tiny: Tiny, up, tmp_path: Path, noted
):
    base, log = noted
    rows = colour_rows(120)
    data = tmp_path / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [*tiny.settings, "--set", f"model.base={base}", "--set", "model.trust_remote_code=true"]
    settings += ["--set", f"data.source={data}", "--set", "adapter.name=noting", "--set", "train.epochs=1"]
    settings += ["--set", "gate.min_records=5", "--set", "data.validation_share=0.5"]
    few = ["--set", "tune.learning_rates=[1e-3]", "--set", "tune.max_steps=2"]
    for command in (["run"], ["train", "--set", "train.seed=1"], ["sweep", "--methods", "lora", *few]):
        done = tiny.home.fineloop(*command, *settings)
        assert done.exit_code == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tiny.base)
    notes = [json.loads(line) for line in log.read_text().splitlines()]
    for process in ("ray_jobs.candidate", "ray_jobs.sweep", "default_worker.py"):
        assert any(process in part for command, _ in notes for part in command), process  # each has loaded it
    found = [(command, text) for command, texts in notes for text in texts]
    measured = 0
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        question = tokenizer.apply_chat_template(asked, tokenize=False)
        commands = [command for command, text in found if question in text]
        # The first driver makes the tokens, of which the others compare a sample: here that is all of them.
        assert "ray_jobs.candidate" in commands[0], row
        assert sum("ray_jobs.sweep" in command for command in commands) == 1, row
        measured += any("default_worker.py" in part for command in commands for part in command)
    assert 0 < measured < len(rows) / 5
