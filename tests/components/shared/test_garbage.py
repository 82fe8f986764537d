"""That the collector lets imported modules be, and the rest of a program's objects not."""

import gc
import subprocess
import sys
import weakref

import pytest

from components.shared import garbage


class Circle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _unfrozen():
    yield
    gc.unfreeze()


def test_what_is_imported_is_not_looked_at_then_or_later(tmp_path, monkeypatch):
    (tmp_path / "imported_once.py").write_text("held = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    with garbage.importing():
        assert not gc.isenabled()
        import imported_once
    assert gc.isenabled()
    assert not any(each is imported_once.held for each in gc.get_objects())
    gc.unfreeze()
    with garbage.importing():
        import imported_once
    assert gc.get_freeze_count() == 0  # nothing new


@pytest.mark.parametrize("before", [0, 1])
def test_what_was_looked_at_before_a_reading_is_so_again_and_nothing_else(before):
    gc.unfreeze()
    if before:
        gc.freeze()
    with garbage.of_new_objects():
        assert gc.get_freeze_count() > 0
        found = weakref.ref(Circle())
        gc.collect()
        assert found() is None
    assert (gc.get_freeze_count() > 0) == bool(before)


def test_what_becomes_garbage_while_nothing_is_looked_for_is_found_afterwards():
    gc.collect()
    with garbage.paused():
        found = weakref.ref(Circle())
        made = [[] for _ in range(100_000)]  # in the ordinary course the collector would have looked
        assert found() is not None
    assert gc.isenabled()
    gc.collect()
    assert found() is None
    assert len(made) == 100_000


def test_an_import_that_fails_leaves_the_collector_as_it_was():
    gc.disable()
    try:
        with pytest.raises(ImportError), garbage.importing():
            raise ImportError
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_process_ends_without_a_last_look():
    looks = (
        "import gc, atexit\nfrom components.shared import garbage\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000))\ngarbage.leave_at_exit()\n"
    )
    output = subprocess.run([sys.executable, "-c", looks], check=True, capture_output=True, text=True).stdout
    assert output == "True\n"
