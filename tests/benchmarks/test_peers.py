"""That no peer is left out in silence."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers import __main__ as peers
from benchmarks.peers import bases, venvs
from tests.models.tiny import build_base


def _run(tokens_per_s: float, loss: float = 1.0, first_loss: float = 3.0) -> dict[str, float]:
    return {"tokens_per_s": tokens_per_s, "peak_mb": 1000.0, "loss": loss, "first_loss": first_loss}


def test_a_peer_that_trained_something_else_is_named() -> None:
    found = {"fineloop": _run(200), "trl": _run(100), "trl packed": _run(90, 1.2), "axolotl": _run(300, 1.2)}
    assert peers.others(found) == {"axolotl": "its loss is 1.200 and Fineloop's 1.000: not the same work"}
    found = {
        side: _run(100, first_loss=first) for side, first in (("fineloop", 3.0), ("trl", 3.1), ("trl packed", 4.0))
    }
    assert peers.others(found) == {"trl": "its first loss is 3.100 and Fineloop's 3.000: not the same work"}
    assert list(peers.others({"trl": _run(100)})) == ["trl"]  # nothing to compare with


def test_each_peer_counts_at_its_fastest() -> None:
    found = {"fineloop": _run(200), "trl": _run(80), "trl packed": _run(90), "axolotl": _run(70)}
    assert peers.fastest(found) == ["trl packed", "axolotl"]


def test_a_peer_without_any_figure_fails_the_benchmark() -> None:
    sides = ["trl", "trl packed", "axolotl"]
    assert peers.unmeasured(sides, {}) == peers.unmeasured(sides, {"trl packed": "no kernel"}) == set()
    assert peers.unmeasured(sides, {"trl": "", "trl packed": "", "fineloop": ""}) == {"trl", "fineloop"}
    assert peers.unmeasured(sides, {"axolotl": "pip failed"}) == {"axolotl"}


def test_what_pip_cannot_install_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINELOOP_PEERS", str(tmp_path / "peers"))
    (tmp_path / "trl.txt").write_text("/no/such/package.whl\n", encoding="utf-8")
    with pytest.raises(venvs.NotInstalledError, match=r"trl: pip: .*no/such/package"):
        venvs.python("trl", pinned=tmp_path)
    assert not (tmp_path / "peers" / "trl" / "ready").exists()


def test_every_peer_has_a_side_and_pins_the_same_torch() -> None:
    pinned = {
        (venvs.PINNED / f"{name}.txt").read_text(encoding="utf-8").split("torch==")[1][:6] for name in venvs.PEERS
    }
    assert pinned == {"2.13.0"}
    assert all((peers.SIDES / f"side_{name}.py").is_file() for name in venvs.PEERS)
    assert {peers.SETTINGS[side].peer for side in peers.SETTINGS} == set(venvs.PEERS)


def test_a_base_of_random_weights_is_read_as_any_other(tmp_path: Path) -> None:
    named = build_base(tmp_path / "named")
    folder = bases.write(tmp_path / "base", "tiny", named)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype is torch.bfloat16
    ours, theirs = (AutoTokenizer.from_pretrained(each)("a word").input_ids for each in (folder, named))
    assert ours == theirs
