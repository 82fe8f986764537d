"""What a sweep found, as it is told and as it is written to a config."""

import io
import tomllib
from pathlib import Path

import pytest

from components.config import config_file
from components.registry.records import RateLoss, Tuned
from components.shared.errors import ConfigError
from components.shared.protocol import Line
from pipelines.commands.arguments import DEFAULT_CONFIG
from pipelines.local.display import Display
from pipelines.local.sweep import apply, changes, with_key

BEST = Tuned(
    method="qlora", rank=16, batch_size=16, prior=1e-3, learning_rate=3.16e-3, loss=1.0, is_inside=True,
    rates=[RateLoss(learning_rate=3.16e-3, loss=1.0, statuses=["finished"])],
)  # fmt: skip


def test_applying_changes_the_rate_and_not_a_byte_else(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(DEFAULT_CONFIG.read_text())
    assert apply(path, config_file.load(path), BEST) == {"train.learning_rate": 3.16e-3}
    assert path.read_text() == DEFAULT_CONFIG.read_text().replace("learning_rate = 1e-3", "learning_rate = 0.00316")
    assert apply(path, config_file.load(path), BEST) == {}


@pytest.mark.parametrize(
    "text",
    [
        "[train]\nlearning_rate = 1e-3 # tuned by hand\nepochs = 2\n",
        "[train] # how\nepochs = 2\n[ray]\nnum_workers = 2\n",
        "[adapter]\nname = 'x'\n",
        "",
        "[train]\nepochs = 2",
    ],
)
def test_a_key_is_set_wherever_its_section_is(text: str) -> None:
    before, after = tomllib.loads(text), tomllib.loads(with_key(text, "train.learning_rate", 5e-4))
    assert after["train"].pop("learning_rate") == 5e-4
    before.get("train", {}).pop("learning_rate", None)
    assert after == {"train": {}, **before}
    assert ("# tuned by hand" in text) == ("# tuned by hand" in with_key(text, "train.learning_rate", 5e-4))


def test_a_config_whose_sections_are_written_otherwise_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('adapter = {name = "x"}\nmodel = {base = "b"}\ndata = {source = "d"}\ntrain = {epochs = 2}\n')
    before = path.read_text()
    with pytest.raises(ConfigError, match=r"left as it is; set train\.learning_rate=0\.00316"):
        apply(path, config_file.load(path), BEST)
    assert path.read_text() == before


def test_another_method_that_won_is_applied_with_its_rank_and_rate() -> None:
    dora = BEST.model_copy(update={"method": "dora"})
    config = config_file.load(DEFAULT_CONFIG)
    assert changes(config, dora) == {"method.name": "dora", "train.learning_rate": 3.16e-3}


def test_trials_grow_as_aligned_rows_above_the_step_s_line() -> None:
    stream = io.StringIO()
    display = Display(stream, live=False)
    display.start("tune")
    for text in (
        "| method rank batch rate seed loss steps outcome",
        "| qlora 16 16 0.00316 0 1.2345 32/32 finished in 1 min 02 s",
        "| qlora 16 16 0.1 0 - 8/32 diverged in 9 s: after 8 steps",
    ):
        display.line(Line("tune", text))
    rows = [line.removeprefix("[tune] ") for line in stream.getvalue().splitlines()[1:]]
    assert len({row.index(word) for row, word in zip(rows, ("outcome", "finished", "diverged"), strict=True)}) == 1
    assert len({row.rindex(word) + len(word) for row, word in zip(rows, ("rate", "0.00316", " 0.1"), strict=True)}) == 1
