"""The first GPU day's list: each piece on the GPUs of this machine, and some of them on processors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_day
from benchmarks.gpu_day import FIRST, NOT_ON_A_PROCESSOR, PIECES, in_process, judge, table
from components.config import config_file
from tests.ray_jobs.conftest import CONFIG


@pytest.mark.gpu
@pytest.mark.parametrize("name", PIECES)
def test_a_piece_passes_on_this_machines_gpus(name: str) -> None:
    pieces = {name: in_process(name, ["--shape", "1B"])}
    judge(pieces)
    assert pieces[name]["status"] in ("passed", "skipped"), pieces[name]


@pytest.mark.parametrize("use_gpu", [True, False])
def test_every_piece_has_a_config_that_is_legal(use_gpu: bool) -> None:
    for name, piece in PIECES.items():
        changes = piece.changes if use_gpu else [NOT_ON_A_PROCESSOR.get(change, change) for change in piece.changes]
        on = [f"ray.use_gpu={str(use_gpu).lower()}", f"ray.num_workers={piece.workers}", "train.micro_batch_size=4"]
        assert config_file.loads(CONFIG.format(base="base"), [*on, *changes]), name


def ran(*losses: float, **more: Any) -> dict[str, Any]:
    return {"status": "ran", "losses": [*losses], "tokens_per_s": 1.0, "peak_bytes": 0, "planned_bytes": 1, **more}


def test_a_piece_is_judged_by_its_losses_and_the_first_ones() -> None:
    pieces = {
        FIRST: ran(6.0, 5.0),
        "int8": ran(6.05, 5.0),
        "qlora, ZeRO-3": ran(6.5, 5.0),
        "qdora, ZeRO-3": ran(6.0, float("nan")),
        "killed and resumed": ran(6.0, 5.0, resumed_apart=0.5),
        "long, packed": ran(9.0, 8.0),
        "long, apart": ran(9.5, 8.0),
        "beside trl": {"status": "skipped", "reason": "not installed"},
    }
    judge(pieces)
    expected = ["passed", "passed", "failed", "failed", "failed", "passed", "failed", "skipped"]
    assert [found["status"] for found in pieces.values()] == expected
    lines = list(table({"machine": {"gpus": [], "torch": "2"}, "pieces": pieces}))
    assert len(lines) == 2 + len(pieces)
    assert "a loss is not finite" in lines[5]


def test_what_has_not_passed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = {name: ran(6.0, 5.0) for name in PIECES} | {"beside trl": {"status": "skipped", "reason": "not installed"}}
    judge(pieces)
    del pieces["int8"]
    out = tmp_path / "day.json"
    out.write_text(json.dumps({"pieces": pieces}))
    tried: list[str] = []
    monkeypatch.setattr(gpu_day, "in_process", lambda name, _: tried.append(name) or ran(6.0, 5.0))
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        gpu_day.main()
    assert ended.value.code == 0
    assert tried == ["int8", "beside trl"]


@pytest.mark.slow
def test_the_day_runs_on_processors_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    out = tmp_path / "day.json"
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--out", str(out), "--only"]
    subprocess.run([*command, FIRST, "killed and resumed"], check=True)
    first = json.loads(out.read_text())["pieces"]
    assert [found["status"] for found in first.values()] == ["passed", "passed"]
    assert first["killed and resumed"]["resumed_apart"] < 0.1
    subprocess.run([*command, "beside unsloth"], check=True)
    pieces = json.loads(out.read_text())["pieces"]
    assert pieces.pop("beside unsloth")["status"] == "skipped"
    assert pieces == first
