"""The train image itself: built from its Dockerfile on a stand-in for Ray's image, and run as a cluster runs it.

Opt-in, as root: `pytest -m podman`. CUDA's wheels are some gigabytes; no GPU is needed, nor a compiler.
"""

from components.config import config_file
from tests.infra.images.containers import IMPORT_ALL, LIMITS, ROOT, podman, podman_tier, run
from tests.infra.images.locks import pins, text_of

pytestmark = podman_tier

SITE = "import importlib.metadata as m; print(*sorted(f'{d.name}=={d.version}' for d in m.distributions()))"
RESOLVE = """
import os, sys
from components.config.schema import ModelConfig
from ray_jobs.base.base_model import resolve
print(*os.listdir(resolve(ModelConfig(base=sys.argv[1])).path))
"""


def test_every_module_is_imported_without_network_on_a_read_only_root(train_image: str) -> None:
    done = run(train_image, "python", "-c", IMPORT_ALL, "components", "ray_jobs")
    assert done.returncode == 0, done.stderr
    number, heavy = done.stdout.splitlines()[-1].split(maxsplit=1)
    assert int(number) > 80
    assert heavy == "['peft', 'torch', 'transformers']"


def test_it_runs_as_uid_1000_with_rays_group_and_cannot_change_the_code(train_image: str) -> None:
    assert run(train_image, "sh", "-c", "id -u; id -g").stdout.split() == ["1000", "100"]
    done = run(train_image, "sh", "-c", "touch /tmp/written && ! touch /app/ray_jobs/x && ! touch /x")
    assert done.returncode == 0, done.stderr
    found = podman("run", "--rm", *LIMITS, train_image, "sh", "-c", "touch /app/ray_jobs/x", check=False)
    assert "Permission denied" in found.stderr  # on a writable root too


def test_the_base_images_sudo_gives_nobody_root(train_image: str) -> None:
    done = run(train_image, "sudo", "-n", "id")
    assert done.returncode != 0
    assert "no new privileges" in done.stderr


def test_nothing_but_the_code_of_ray_jobs_and_the_locks_is_in_it(train_image: str) -> None:
    done = run(train_image, "sh", "-c", "ls -A /app /locks && find /app -name '*.md' -o -name '.git*' -o -name 'test*'")
    locks = ["build.lock", "train.lock", "weights.lock"]
    assert done.stdout.split() == ["/app:", "components", "ray_jobs", "/locks:", *locks]


def test_what_is_installed_has_the_versions_of_the_locks(train_image: str) -> None:
    done = run(train_image, "python", "-c", SITE)
    installed = {pin.partition("==")[0].lower().replace("_", "-").replace(".", "-"): pin for pin in done.stdout.split()}
    wanted = pins(text_of("train")) | pins(text_of("weights"))
    assert {name for name in wanted if name not in installed} == set()
    # A local version such as torch's +cu130 says which build of that version it is.
    found = {name: installed[name].partition("==")[2].partition("+")[0] for name in wanted}
    assert found == wanted


def test_torch_is_the_build_for_cuda_13_and_finds_no_gpu_here_without_failing(train_image: str) -> None:
    done = run(train_image, "python", "-c", "import torch; print(torch.version.cuda, torch.cuda.is_available())")
    assert done.stdout.split() == ["13.0", "False"], done.stderr


def test_the_built_in_examples_base_comes_out_of_its_wheel_without_a_network(train_image: str) -> None:
    example = config_file.load(ROOT / "pipelines/configs/icd10.toml")
    done = run(train_image, "python", "-c", RESOLVE, example.model.base)
    assert "model.safetensors" in done.stdout.split(), done.stderr
