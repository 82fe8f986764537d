"""A real Kubernetes control plane on loopback: etcd, the API server and its controllers, as `make kube` builds them.

Its limits: version 1.20, so no Pod Security and no CEL rules in CRDs; no scheduler and no kubelet, so no pod ever runs.
"""

import contextlib
import copy
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from infra.checks.manifests import KUBECTL, ROOT, Loader
from infra.checks.schemas import crds_folder, definitions
from pipelines.local.server import choose_ports
from tests.doubles.kubernetes import kubeconfig
from tests.waiting import wait_until

Resource = dict[str, Any]
FOLDER = ROOT / ".fineloop" / "kube"
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager")
NAMESPACE = "fineloop"
_ADMIN_TOKEN = "an-administrators-token"
_RAYJOBS = ("ray.io", "v1", NAMESPACE, "rayjobs")

absent = [program for program in PROGRAMS if not (FOLDER / program).is_file()]
needs_control_plane = [
    pytest.mark.kubernetes,
    pytest.mark.skipif(bool(absent), reason="no control plane: `make kube` builds it"),
    pytest.mark.skipif(crds_folder() is None, reason="FINELOOP_CRDS is not set: `make crds` says how"),
]


class ControlPlane:
    """A running one, with KubeRay's and Kueue's definitions."""

    def __init__(self, directory: Path, address: str) -> None:
        self.directory, self.address = directory, address
        self.admin = self.kubeconfig("admin", _ADMIN_TOKEN)
        self.api = self.client(self.admin)
        self.core = client.CoreV1Api(self.api)

    def kubeconfig(self, user: str, token: str) -> Path:
        """Write one for a user."""
        cluster = {"server": self.address, "certificate-authority": str(self.directory / "certs" / "apiserver.crt")}
        path = self.directory / f"{user}.kubeconfig"
        return kubeconfig.write(path, cluster, namespace=NAMESPACE, token=token)

    def account(self, name: str) -> Path:
        """A kubeconfig with a token of a service account, as its pods get it."""
        wanted = {"spec": {"audiences": [self.address], "expirationSeconds": 3600}}
        found = self.core.create_namespaced_service_account_token(name, NAMESPACE, wanted)
        return self.kubeconfig(name, found.status.token)

    def client(self, kubeconfig: Path) -> client.ApiClient:
        found: client.ApiClient = config.new_client_from_config(config_file=str(kubeconfig))
        return found

    def kubectl(
        self, *arguments: str, given: str = "", kubeconfig: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        command = [str(KUBECTL), "--kubeconfig", str(kubeconfig or self.admin), *arguments]
        return subprocess.run(command, input=given, capture_output=True, text=True, check=False, cwd=ROOT)

    def apply(self, manifests: list[Resource]) -> list[Resource]:
        """Each object as it is after `kubectl apply`.

        Raises:
            ValueError: the API server refuses one; the message is its own.
        """
        return self._send("apply", manifests)

    def create(self, manifests: list[Resource]) -> list[Resource]:
        """The same, of objects that must be new."""
        return self._send("create", manifests)

    def _send(self, verb: str, manifests: list[Resource]) -> list[Resource]:
        given = yaml.safe_dump_all([_as_of_1_20(manifest) for manifest in manifests])
        done = self.kubectl(verb, "--validate=false", "--output", "yaml", "--filename", "-", given=given)
        if done.returncode:
            raise ValueError(done.stderr)
        documents = yaml.load_all(done.stdout, Loader=Loader)  # several of `create`, one List of `apply`
        return [each for document in documents for each in document.get("items", [document])]


class RayJobsOfCluster:
    """The RayJobs of a real API server, as `operator.Operator` takes them."""

    def __init__(self, plane: ControlPlane) -> None:
        self._objects = client.CustomObjectsApi(plane.api)
        self.changed = threading.Condition()
        self.pods: dict[str, Resource] = {}
        """What the operator says of pods leads nowhere: none is real here."""
        self.pod_logs: dict[str, Callable[[], str]] = {}

    @property
    def rayjobs(self) -> dict[str, Resource]:
        found = self._objects.list_namespaced_custom_object(*_RAYJOBS)["items"]
        return {each["metadata"]["name"]: each for each in found}

    def write(self, name: str, change: Callable[[Resource], None]) -> None:
        found = self._objects.get_namespaced_custom_object(*_RAYJOBS, name)
        change(found)
        with _unless_gone():
            self._objects.replace_namespaced_custom_object(*_RAYJOBS, name, found)

    def patch_status(self, name: str, status: Resource) -> None:
        with _unless_gone():
            self._objects.patch_namespaced_custom_object_status(*_RAYJOBS, name, {"status": status})

    def remove_finalizers(self, name: str) -> None:
        with _unless_gone():
            self._objects.patch_namespaced_custom_object(*_RAYJOBS, name, {"metadata": {"finalizers": None}})

    def clear(self) -> None:
        """Delete all, when no operator is left that would take its finalizer away."""
        self._objects.delete_collection_namespaced_custom_object(*_RAYJOBS)
        for name in self.rayjobs:
            self.remove_finalizers(name)


@contextlib.contextmanager
def running(directory: Path) -> Iterator[ControlPlane]:
    """Start one in an empty folder; it and all that it holds is gone afterwards."""
    client_port, peer_port, port = choose_ports(3)
    etcd = f"http://127.0.0.1:{client_port}"
    subprocess.run(
        ["openssl", "genrsa", "-traditional", "-out", "sa.key"], cwd=directory, check=True, capture_output=True
    )
    (directory / "tokens.csv").write_text(f'{_ADMIN_TOKEN},admin,1,"system:masters"\n')
    address = f"https://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        _start(
            stack,
            directory,
            *("etcd", "--data-dir=etcd-data", "--unsafe-no-fsync", f"--listen-client-urls={etcd}"),
            *(f"--advertise-client-urls={etcd}", f"--listen-peer-urls=http://127.0.0.1:{peer_port}"),
            *(f"--initial-advertise-peer-urls=http://127.0.0.1:{peer_port}",),
            f"--initial-cluster=default=http://127.0.0.1:{peer_port}",
        )
        api_server = _start(
            stack,
            directory,
            *("kube-apiserver", f"--etcd-servers={etcd}", "--bind-address=127.0.0.1", f"--secure-port={port}"),
            *("--advertise-address=127.0.0.1", "--cert-dir=certs", "--service-cluster-ip-range=10.96.0.0/24"),
            *("--service-account-key-file=sa.key", "--service-account-signing-key-file=sa.key"),
            *(f"--service-account-issuer={address}", "--token-auth-file=tokens.csv", "--authorization-mode=RBAC"),
            "--endpoint-reconciler-type=none",
        )
        plane = _when_ready(directory, address, api_server)
        # Not applied: they are too long for the annotation in which `apply` would keep them.
        plane.create(list(definitions(crds_folder() or Path())))
        wait_until(lambda: plane.kubectl("get", "rayjobs.ray.io", "-A").returncode == 0, "RayJobs are not served")
        # Now, so that the quota's controller finds the new kinds: it looks for them every half minute.
        _start(
            stack,
            directory,
            *("kube-controller-manager", f"--kubeconfig={plane.admin}", "--leader-elect=false", "--port=0"),
            *("--secure-port=0", "--use-service-account-credentials=false"),
            "--service-account-private-key-file=sa.key",
        )
        yield plane


def _start(stack: contextlib.ExitStack, directory: Path, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
    log = stack.enter_context((directory / f"{program}.log").open("wb"))
    process = subprocess.Popen([FOLDER / program, *arguments], cwd=directory, stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return process


def _when_ready(directory: Path, address: str, api_server: "subprocess.Popen[bytes]") -> ControlPlane:
    wait_until((directory / "certs" / "apiserver.crt").exists, "the API server made no certificate")
    plane = ControlPlane(directory, address)

    def is_ready() -> bool:
        assert api_server.poll() is None, (directory / "kube-apiserver.log").read_text()[-3000:]
        return plane.kubectl("get", "--raw", "/readyz").returncode == 0

    wait_until(is_ready, "the API server is not ready")
    return plane


@contextlib.contextmanager
def _unless_gone() -> Iterator[None]:
    """What was deleted meanwhile needs no word of ours."""
    try:
        yield
    except client.ApiException as exc:
        if exc.status not in (404, 409):
            raise


def _as_of_1_20(manifest: Resource) -> Resource:
    """The same object for this old API server."""
    manifest = copy.deepcopy(manifest)
    if manifest["kind"] == "CronJob":
        manifest["apiVersion"] = "batch/v1beta1"
    if manifest["kind"] == "CustomResourceDefinition":
        _without_empty_defaults(manifest)
    return manifest


def _without_empty_defaults(schema: Any) -> None:
    """1.20 takes no `default: ""`, and no key of a list map whose default is gone."""
    if isinstance(schema, list):
        for each in schema:
            _without_empty_defaults(each)
    elif isinstance(schema, dict):
        properties = schema.get("items", {}).get("properties", {}) if isinstance(schema.get("items"), dict) else {}
        keys = schema.get("x-kubernetes-list-map-keys", [])
        if any(properties.get(key, {}).get("default") == "" for key in keys):
            del schema["x-kubernetes-list-map-keys"]
            schema["x-kubernetes-list-type"] = "atomic"
        if schema.get("default") == "":
            del schema["default"]
        for each in schema.values():
            _without_empty_defaults(each)
