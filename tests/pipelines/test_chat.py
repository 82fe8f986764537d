"""`fineloop chat` as a process, on a real store and a real version of the tiny base."""

from pathlib import Path

import pytest

from components.config import config_file
from components.store.store import Store
from tests.models.tiny import build_base
from tests.models.tiny_version import publish
from tests.pipelines.command_line import fineloop


@pytest.mark.slow
def test_each_line_is_answered_by_base_and_adapter_and_the_answers_alone_are_on_stdout(
    store: Store, tmp_path: Path
) -> None:
    (tmp_path / "where.toml").write_text(
        '[adapter]\nname = "colours"\n[data]\nsource = "none.jsonl"\n[method]\nname = "lora"\nrank = 4\n'
        f'[model]\nbase = "{build_base(tmp_path / "base")}"\nmax_length = 64\n'
        f'[registry]\nbucket = "{store.bucket}"\nprefix = "{store.prefix}"\n[evaluate]\nmax_new_tokens = 4\n'
    )
    publish(config_file.load(tmp_path / "where.toml"), store, tmp_path)
    done = fineloop("chat", "colours", "-c", "where.toml", cwd=tmp_path, typed="sky?\nsnow?\n")
    assert done.returncode == 0, done.stderr
    speakers = [line.partition("|")[0].strip() for line in done.stdout.splitlines() if "|" in line]
    assert speakers == ["base", "colours"] * 2
    words = [line.partition(" ")[0] for line in done.stderr.splitlines() if not line.startswith(">")]
    assert [word for word in words if word in ("starting", "loading", "ready:")] == [
        "starting", "loading", "loading", "ready:",
    ]  # fmt: skip
