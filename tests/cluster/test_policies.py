"""Who reaches whom on a live cluster, line by line of the table in infra/README.md, by pods that try."""

import json

import pytest

from tests.cluster.kube import STEP, Kube, pod, until

pytestmark = pytest.mark.cluster

RAY = {"ray.io/is-ray-node": "yes"}
PODS = {
    "nobody": {"x": "y"},
    "step": STEP,
    "ray": RAY,
    "submitter": {"app.kubernetes.io/component": "ray-submitter"},
    "reaper": {"app.kubernetes.io/name": "fineloop-reap"},
}
MAY = {
    "dashboard": {"step", "ray", "submitter", "reaper"},
    "gcs": {"ray"},
    "store": {"step", "ray"},
    "kubernetes": {"step", "reaper"},
    "metadata": set[str](),
}
TRY = """
import json, socket, sys, time
time.sleep(20)  # the policies of a new pod open its way only seconds after it has started
found = {}
for name, (host, port) in json.loads(sys.argv[1]).items():
    for _ in range(3):
        try:
            socket.create_connection((host, port), 4).close()
            found[name] = "open"
            break
        except OSError:
            found[name] = "cut"
print(json.dumps(found))
"""
LISTEN = """
import socket, time
open_ports = [socket.create_server(("", port)) for port in (8265, 6379)]
time.sleep(3600)
"""


def test_each_end_is_reached_by_these_pods_alone(kube: Kube, step_image: str) -> None:
    names = {who: f"{kube.name}-{who}" for who in (*PODS, "head")}
    try:
        kube.kubectl("create", "-f", "-", body=pod(names["head"], RAY, step_image, "python", "-c", LISTEN))
        kube.kubectl("wait", "pod", names["head"], "--for", "condition=Ready", "--timeout", "300s")
        head = kube.get("pod", names["head"])["status"]["podIP"]
        service = kube.get("service", "kubernetes", namespace="default")["spec"]
        store = kube.get("service", "fineloop-s3").get("spec", {})
        ends = {
            "dashboard": (head, 8265),
            "gcs": (head, 6379),
            **({"store": (store["clusterIP"], 8333)} if store else {}),
            "kubernetes": (service["clusterIP"], 443),
            "metadata": ("169.254.169.254", 80),
        }
        for who, labels in PODS.items():
            asked = ("python", "-c", TRY, json.dumps(ends))
            kube.kubectl("create", "-f", "-", body=pod(names[who], labels, step_image, *asked))
        found = {}
        for who in PODS:
            until(lambda name=names[who]: kube.get("pod", name)["status"]["phase"] == "Succeeded", f"{who} has tried")
            found[who] = json.loads(kube.kubectl("logs", names[who]))
        expected = {who: {end: "open" if who in MAY[end] else "cut" for end in ends} for who in PODS}
        assert found == expected
    finally:
        kube.kubectl("delete", "pod", *names.values(), "--ignore-not-found", "--now")
