"""Our pods keep checkov's rules, and checkov sees what breaks one: `make infra-lint` installs it and runs this.

It looks into no RayJob, so each pod is handed to it on its own; infra/checkov.yaml says which rules are not for us.
"""

import json
import subprocess
from collections import defaultdict
from collections.abc import Mapping

import pytest
import yaml

from infra.checks.manifests import INFRA, OVERLAYS, ROOT, render_overlay
from infra.checks.pods import pods
from tests.infra.changes import CONTAINER, REAPER, REMOVED, WORKER, changed
from tests.infra.created import CONFIGS, created

pytestmark = pytest.mark.checkov

CHECKOV = ROOT / ".venv-checkov" / "bin" / "checkov"
SECURITY = f"{CONTAINER} securityContext"
AS_ROOT = {"name": "chown", "image": "x:1", "securityContext": {"runAsNonRoot": False, "runAsUser": 0}}
BREAKS = [  # of each place that holds pods or containers
    ("CKV_K8S_13", f"{REAPER} spec containers 0 resources", REMOVED),
    ("CKV_K8S_19", f"{REAPER} spec hostNetwork", True),
    ("CKV_K8S_20", "RayCluster spec autoscalerOptions securityContext", REMOVED),
    ("CKV_K8S_22", f"{SECURITY} readOnlyRootFilesystem", False),
    ("CKV_K8S_23", f"{WORKER} initContainers", [AS_ROOT]),
]


@pytest.fixture(scope="module")
def rules_broken(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, set[str]]:
    """The ids of the rules that some pod of a set breaks, by the set's name; one start of checkov for all."""
    folder = tmp_path_factory.mktemp("pods")
    sets = {overlay: render_overlay(overlay) for overlay in OVERLAYS}
    sets |= {name: [created(config)] for name, config in CONFIGS.items()}
    sets |= {str(n): changed(render_overlay("kind"), *breaking) for n, (_, *breaking) in enumerate(BREAKS)}
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


@pytest.mark.parametrize("name", [*OVERLAYS, *CONFIGS])
def test_our_pods_break_no_rule(name: str, rules_broken: Mapping[str, set[str]]) -> None:
    assert rules_broken.get(name, set()) == set()


@pytest.mark.parametrize("number", range(len(BREAKS)), ids=lambda n: "-".join(BREAKS[n][:2]))
def test_checkov_sees_it_when(number: int, rules_broken: Mapping[str, set[str]]) -> None:
    assert BREAKS[number][0] in rules_broken[str(number)]
