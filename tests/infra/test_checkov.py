"""Our pods keep checkov's rules, and checkov sees what breaks one: `make infra-lint` installs it and runs this.

It looks into no RayJob, so each pod is handed to it on its own; infra/checkov.yaml says which rules are not for us.
"""

import json
import subprocess
from collections import defaultdict
from collections.abc import Mapping

import pytest
import yaml

from infra.checks.manifests import INFRA, OVERLAYS, ROOT, Manifest, render_overlay
from infra.checks.pods import pods
from tests.infra.created import CONFIGS, created
from tests.infra.mutations import pods as mutations
from tests.infra.mutations.breaks import Break

pytestmark = pytest.mark.checkov

CHECKOV = ROOT / ".venv-checkov" / "bin" / "checkov"
BREAKS = {
    name: found for name, found in vars(mutations).items() if isinstance(found, Break) and isinstance(found.policy, str)
}


def kept() -> dict[str, list[Manifest]]:
    """What people apply, and what `fineloop` creates."""
    return {overlay: render_overlay(overlay) for overlay in OVERLAYS} | {
        name: [created(config)] for name, config in CONFIGS.items()
    }


def broken(found: Break) -> list[Manifest]:
    manifests = render_overlay(found.overlay)
    found.mutate(manifests)
    return manifests


@pytest.fixture(scope="module")
def rules_broken(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, set[str]]:
    """The ids of the rules that some pod of a set breaks, by the set's name; one start of checkov for all."""
    folder = tmp_path_factory.mktemp("pods")
    sets = kept() | {name: broken(found) for name, found in BREAKS.items()}
    written = {name: [pod.as_object() for pod in pods(manifests)] for name, manifests in sets.items()}
    for name, objects in written.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(objects), encoding="utf-8")
    options = ["--config-file", INFRA / "checkov.yaml", "--framework", "kubernetes", "--output", "json"]
    done = subprocess.run([CHECKOV, *options, "--directory", folder], capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout)
    assert answer["summary"]["resource_count"] == sum(map(len, written.values()))
    by_set = defaultdict(set)
    for failure in answer["results"]["failed_checks"]:
        by_set[failure["file_path"].strip("/").removesuffix(".yaml")].add(failure["check_id"])
    return by_set


@pytest.mark.parametrize("name", kept())
def test_our_pods_break_no_rule(name: str, rules_broken: Mapping[str, set[str]]) -> None:
    assert rules_broken.get(name, set()) == set()


@pytest.mark.parametrize("name", BREAKS)
def test_checkov_sees_it_when(name: str, rules_broken: Mapping[str, set[str]]) -> None:
    assert BREAKS[name].policy in rules_broken[name]
