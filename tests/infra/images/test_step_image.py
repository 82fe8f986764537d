"""The step image itself: built from its Dockerfile on a Debian base with the same Python, and run as a cluster runs it.

Opt-in, as root: `pytest -m podman`. Needs podman, runc and debootstrap, Debian's mirror and PyPI; no image registry.
"""

from tests.infra.images.containers import IMPORT_ALL, LIMITS, podman, podman_tier, run

pytestmark = podman_tier


def test_every_module_is_imported_without_network_on_a_read_only_root(step_image: str) -> None:
    done = run(step_image, "python", "-c", IMPORT_ALL, "components", "pipelines")
    assert done.returncode == 0, done.stderr
    number, heavy = done.stdout.split(maxsplit=1)
    assert int(number) > 50
    assert heavy.strip() == "[]"


def test_it_runs_as_uid_1000_and_cannot_change_the_code(step_image: str) -> None:
    assert run(step_image, "id", "-u").stdout.strip() == "1000"
    assert run(step_image, "sh", "-c", "touch /tmp/written && ! touch /app/components/x && ! touch /x").returncode == 0
    found = podman("run", "--rm", *LIMITS, step_image, "sh", "-c", "touch /app/components/x", check=False)
    assert "Permission denied" in found.stderr  # on a writable root too


def test_it_holds_the_command_line_and_the_built_in_data(step_image: str) -> None:
    assert "usage: fineloop" in run(step_image).stdout
    assert "usage: fineloop compile" in run(step_image, "python", "-m", "pipelines.cli", "compile", "--help").stdout
    done = run(step_image, "python", "-c", "import simple_icd_10_cm as icd; print(icd.get_description('A00'))")
    assert done.stdout.strip() == "Cholera", done.stderr


def test_it_compiles_the_pipeline_of_the_built_in_example(step_image: str) -> None:
    done = run(
        step_image, "sh", "-c", "python -m pipelines.cli compile -o /tmp/pipeline.yaml && cat /tmp/pipeline.yaml"
    )
    assert "pipelineInfo:" in done.stdout, done.stderr


def test_nothing_but_the_code_and_the_locks_is_in_it(step_image: str) -> None:
    done = run(step_image, "sh", "-c", "ls -A /app /locks && find /app -name '*.md' -o -name '.git*'")
    assert done.stdout.split() == ["/app:", "components", "pipelines", "/locks:", "build.lock", "step.lock"]
