"""`make crds`: fetch the custom resource definitions of the versions that the runbook installs.

They come from the projects' release tags and are checked by sha256, and are kept outside the repository's files.
"""

import hashlib
import os
import sys
import urllib.request
from pathlib import Path

from infra.checks.manifests import ROOT
from infra.checks.schemas import VARIABLE

FOLDER = ROOT / ".fineloop" / "crds"
KUBERAY = "https://raw.githubusercontent.com/kuberay-project/kuberay/v1.7.0/ray-operator/config/crd/bases"
KUEUE = "https://raw.githubusercontent.com/kubernetes-sigs/kueue/v0.19.2/config/components/crd/bases"
PROMETHEUS = (
    "https://raw.githubusercontent.com/prometheus-operator/prometheus-operator/v0.93.0/example/prometheus-operator-crd"
)
FILES = {
    f"{KUBERAY}/ray.io_rayclusters.yaml": "c44704442eef0c6721ad40c1d66782c8bd3fdab9d3344306a5820910a679baa1",
    f"{KUBERAY}/ray.io_rayjobs.yaml": "01a5cf3b17c1769fda44af7e82debcd98722f0c27b9ab84d084681c6649121f5",
    f"{KUEUE}/kueue.x-k8s.io_clusterqueues.yaml": "e0a5fc9b370c70f3d993d4f599865817338ecf94187b30b15b12ff33c579bd55",
    f"{KUEUE}/kueue.x-k8s.io_localqueues.yaml": "dd10ef8d3578e7212fa52763549e7b6be0949793a5b924495fcd293330109fed",
    f"{KUEUE}/kueue.x-k8s.io_resourceflavors.yaml": "19e339c47e9ca3fa2c9eeddd27715a512f765c4794ed859733408a9715720173",
    f"{KUEUE}/kueue.x-k8s.io_workloadpriorityclasses.yaml": (
        "0b755726aab05b8def9a53ee15b201eed3846bcffd1ff5528fed123f4ae03519"
    ),
    f"{PROMETHEUS}/monitoring.coreos.com_podmonitors.yaml": (
        "45a93443daa687d3654f7e9631909ff7edcdf3ec09c5e60251b74aa2722aee5d"
    ),
    f"{PROMETHEUS}/monitoring.coreos.com_prometheusrules.yaml": (
        "78be98554b9c8506ab2b4f4feb91c5f3a56e536a0a510f3a8e876a459970d56d"
    ),
    f"{PROMETHEUS}/monitoring.coreos.com_servicemonitors.yaml": (
        "a99047972c9dd7679ce2050b9968e8a08773492e671b3e17abd476d42aa78a32"
    ),
}
"""The address of each definition, and its sha256."""


def fetch(folder: Path, files: dict[str, str]) -> None:
    """Download the files that are missing or changed; a file with another sha256 is not kept.

    Raises:
        OSError: a file cannot be downloaded.
        ValueError: a file is not the one that was released.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for url, sha256 in files.items():
        path = folder / url.rpartition("/")[2]
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            continue
        with urllib.request.urlopen(url, timeout=60) as answer:
            body = answer.read()
        found = hashlib.sha256(body).hexdigest()
        if found != sha256:
            raise ValueError(f"{url}: sha256 {found} is not {sha256}")
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(body)
        unfinished.rename(path)


def main() -> int:
    """Fetch the definitions, and print the line to paste into a shell."""
    try:
        fetch(FOLDER, FILES)
    except (OSError, ValueError) as exc:
        print(f"crds: {exc}", file=sys.stderr)
        return 1
    print(f"export {VARIABLE}={FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
