"""What a sweep found, as it is printed and as it is written to a config."""

import io
import tomllib
from pathlib import Path

import pytest

from components.config import config_file
from components.records import runs
from components.records.sweep import RateLoss, SweepResult, Tuned, TunedRate
from components.shared.protocol import Line
from pipelines.configs import DEFAULT_CONFIG
from pipelines.local.display import Display
from pipelines.local.run import Place, apply, changes, run, sweep, sweep_lines

pytestmark = pytest.mark.usefixtures("forked")

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
    dora = BEST.model_copy(update={"method": "dora"})
    assert changes(config_file.load(DEFAULT_CONFIG), dora) == {"method.name": "dora", "train.learning_rate": 3.16e-3}


@pytest.mark.parametrize(
    "train",
    [
        "[train]\nlearning_rate = 1e-3 # tuned by hand\nepochs = 2\n",
        "[train] # how\nepochs = 2\n[ray]\nnum_workers = 2\n",
        "[train]\nepochs = 2",
        "",
        "train = {epochs = 2, learning_rate = 1e-3}\n",
        "train.epochs = 2\n",
    ],
)
def test_the_rate_is_set_however_its_section_is_written(train: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    others = 'adapter = {name = "x"} # whose\nmodel.base = "b"\ndata = {source = "d"}\n'
    path.write_text(others + train)
    before = tomllib.loads(path.read_text())
    apply(path, config_file.load(path), BEST)
    after = tomllib.loads(path.read_text())
    assert after.pop("train") == {**before.pop("train", {}), "learning_rate": 3.16e-3}
    assert after == before
    assert path.read_text().count("#") == (others + train).count("#")


def test_trials_are_aligned_rows_above_the_steps_line_and_say_whole_why_one_failed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    display = Display(stream, live=True)
    display.start("tune")
    why = "after 2 steps the validation loss is 11.4, and 8.395 at its start"
    display.line(Line("tune", "| qlora 16 16 0.00316 0 1.2345 32/32 finished in 1 min 02 s"))
    display.line(Line("tune", f"| qlora 16 16 0.01 0 - 2/8 diverged in 6.3 s: {why}"))
    display.line(Line("tune", f"1/5 trials, about 45 s left; {why}"))
    *_, first, row, live = stream.getvalue().split("\n")
    assert row.endswith(why)
    rows = [text.rpartition("\x1b[2K")[2] for text in (first, row)]
    assert rows[0].index("finished") == rows[1].index("diverged")
    assert rows[0].index("0.00316") + 7 == rows[1].index("0.01") + 4
    assert len(live.rpartition("\r")[2]) < 60 + len("\x1b[2K\x1b[36m\x1b[0m")


def test_a_sweep_here_is_shown_as_it_goes_and_leaves_its_record_and_picture(stub_cluster, make_config, tmp_path):
    terminal = io.StringIO()
    result = sweep(make_config(), Place(tmp_path / "home", terminal), run_id="s1")
    prior = make_config().learning_rate
    assert (result.best.learning_rate, result.best.is_inside) == (10 * prior, True)
    assert "0.002     0    1.5000        4/4  finished in 3 s" in terminal.getvalue()
    folder = tmp_path / "home" / "runs" / "s1"
    assert SweepResult.from_json((folder / "sweep.json").read_bytes(), "sweep.json") == result
    assert (folder / "sweep.svg").read_text().startswith("<svg")
    lines = list(sweep_lines(result))
    assert lines[-1] == "a verdict"
    assert [line.split()[0] for line in lines[1:4]] == [f"{prior:.3g}", "*", f"{100 * prior:.3g}"]


@pytest.mark.slow
def test_a_run_that_tunes_remembers_its_rate_for_the_next(stub_cluster, store, make_config, tmp_path):
    config = make_config("tune.when=no_prior_sweep")
    for run_id in ("first", "second"):
        terminal = io.StringIO()
        run(config, Place(tmp_path / "home", terminal), what="train", run_id=run_id)
        assert runs.read(store, run_id, TunedRate).learning_rate == 10 * config.learning_rate
        assert "which the sweep of run first found" in terminal.getvalue()
        assert [step.step for step in runs.steps(store, run_id)] == ["prepare", "tune", "finetune", "evaluate"]
    assert runs.find(store, "second", SweepResult) is None
