"""What a pod's disk has to hold; the size of Llama 2 70B is Hugging Face's: 68,976,648,192 parameters."""

import pytest

from components.config import config_file
from components.config.schema import RunConfig
from components.shared.errors import ConfigError
from ray_jobs.planning.capacity import disk_bytes
from ray_jobs.planning.rehearsal import Rehearsal
from tests.models.shapes import LLAMA_2_70B

PARAMETERS = 68_976_648_192
CONFIG = """
[adapter]
name = "support"
[model]
base = "llama-2-70b"
[data]
source = "rows.jsonl"
[method]
name = "lora"
"""


def configured(*changes: str) -> RunConfig:
    return config_file.loads(CONFIG, changes)


def in_pods(*changes: str) -> RunConfig:
    return configured("ray.cluster.kind=rayjob", "ray.use_gpu=true", "ray.gpu=H100", *changes)


def test_a_base_that_a_pods_disk_does_not_hold_is_refused_before_it_is_downloaded():
    needed = disk_bytes(in_pods(), LLAMA_2_70B, Rehearsal.of(in_pods(), LLAMA_2_70B).stats)
    assert needed == 2 * PARAMETERS
    with pytest.raises(ConfigError, match=r"writes 128 GiB .*disk_gib is 100, .* set ray\.cluster\.disk_gib=161"):
        in_pods().ray.require_disk("llama", needed)
    in_pods("ray.cluster.disk_gib=129").ray.require_disk("llama", needed)
    assert disk_bytes(configured(), LLAMA_2_70B, Rehearsal.of(configured(), LLAMA_2_70B).stats) is None


def test_a_base_in_nf4_that_the_run_makes_lies_beside_the_original():
    """At 4.5 bits a weight with NF4's scales (arXiv:2305.14314, section 3), and what stays in 16 bits."""
    config = in_pods("method.name=qlora")
    stats = Rehearsal.of(config, LLAMA_2_70B).stats
    made = disk_bytes(in_pods("method.name=qlora", "method.init=loftq"), LLAMA_2_70B, stats)
    assert made - disk_bytes(config, LLAMA_2_70B, stats) > 4.5 / 8 * PARAMETERS
