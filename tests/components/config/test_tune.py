"""Keys of `tune` that earlier configs have: accepted for a release, which says so, and no part of what a config is."""

import logging

from components.config import config_file
from components.config.tune import FORMER
from tests.components.config.loading import GOOD


def test_earlier_keys_are_accepted_and_one_line_says_so(caplog):
    changes = ["tune.space.learning_rates=[1e-3]", "tune.refine=false", "tune.scheduler=none", "tune.seeds=2"]
    with caplog.at_level(logging.WARNING):
        tune = config_file.loads(GOOD, changes).tune
    assert (tune.learning_rates, tune.seeds) == ([1e-3], 2)
    (line,) = caplog.messages
    assert line.startswith("tune.refine, tune.scheduler, tune.space: no longer read")


def test_a_config_that_holds_them_at_their_defaults_says_nothing_and_is_the_same(caplog):
    own = {"when": "always", "learning_rates": []}
    plain = config_file.loads(GOOD, ["tune.when=always"])
    table = config_file.as_table(plain)
    whole = config_file.validate({**table, "tune": {**own, **FORMER}})
    assert (whole, whole.digest) == (plain, plain.digest)
    assert not caplog.messages
