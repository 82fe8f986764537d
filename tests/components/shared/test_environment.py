"""What a block sets is there inside it, and what was there before comes back, however the block ends."""

import os

import pytest

from components.shared.machine import in_environment


def test_variables_are_set_inside_and_as_before_after(monkeypatch):
    monkeypatch.setenv("HELD", "before")
    monkeypatch.delenv("UNSET", raising=False)
    with in_environment({"HELD": "inside", "UNSET": "inside"}):
        assert (os.environ["HELD"], os.environ["UNSET"]) == ("inside", "inside")
    assert os.environ["HELD"] == "before"
    assert "UNSET" not in os.environ

    with pytest.raises(KeyError), in_environment({"UNSET": "inside"}):
        raise KeyError
    assert "UNSET" not in os.environ

    with in_environment({"UNSET": "inside"}):
        del os.environ["UNSET"]  # as whoever runs inside may
    assert "UNSET" not in os.environ
