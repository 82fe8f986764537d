import random
from pathlib import Path

import pytest

from components.prepare import workspace
from components.prepare.workspace import Texts


@pytest.mark.parametrize("at_once", [1, 100, 2**20])
def test_texts_come_back_one_by_one_some_and_all(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "BLOCK_BYTES", at_once)
    rng = random.Random(0)
    given = ["", *("é" * rng.randrange(40) + str(number) for number in range(500)), "", "x" * 5000, ""]
    found = Texts.write(tmp_path / "texts", [given[:100], [], given[100:]])
    assert (list(found), len(found)) == (given, len(given))
    assert [found[place] for place in range(0, 504, 9)] == given[::9]
    assert found[3:70] == given[3:70]
    assert list(Texts.write(tmp_path / "none", [])) == []
