"""DoRA's magnitudes as they are trained and published, against the equation in `tests.models.magnitudes`."""

import pytest

from components.config import config_file
from components.config.schema import RunConfig
from tests.models.magnitudes import measured
from tests.models.tiny import colour_rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", "qdora", "dvora"])
def test_a_training_at_the_default_rate_multiplies_by_the_magnitudes_that_it_learns(name, config: RunConfig):
    changes = [f"method.name={name}", "method.rank=8", "train.max_steps=60", "ray.num_workers=1"]
    settings = config_file.dumps(config_file.loads(config_file.dumps(config), changes))
    rate = f"learning_rate = {config.learning_rate}"
    assert rate in settings
    found = measured(settings.replace(rate, ""), colour_rows(60 * 16 * 8 // 7 + 8), colour_rows(600))
    assert found.true_rms > 5e-4  # it learns some
    assert found.correlation > 0.99
    assert found.share_lost < 0.05
    assert found.loss_as_loaded == pytest.approx(found.loss_as_trained, abs=1e-4)
