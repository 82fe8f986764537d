"""Pods that a policy must refuse."""

from infra.checks.manifests import Manifest
from infra.checks.policies import pods
from tests.infra.mutations.breaks import breaks, cluster, container, job, pod, reap, the


@breaks("CKV_K8S_23")
def a_worker_may_be_root(m: list[Manifest]) -> None:
    pod(m)["securityContext"] = {"seccompProfile": {"type": "RuntimeDefault"}}


@breaks("CKV_K8S_23")
def a_container_is_root_again(m: list[Manifest]) -> None:
    container(m)["securityContext"] |= {"runAsNonRoot": False, "runAsUser": 0}


@breaks("CKV_K8S_23")
def an_init_container_is_root(m: list[Manifest]) -> None:
    root = container(m)["securityContext"] | {"runAsNonRoot": False, "runAsUser": 0}
    pod(m)["initContainers"] = [{**container(m), "name": "chown", "securityContext": root}]


@breaks("CKV_K8S_20")
def a_process_may_gain_privileges(m: list[Manifest]) -> None:
    container(m)["securityContext"]["allowPrivilegeEscalation"] = True


@breaks("CKV_K8S_16")
def a_container_is_privileged(m: list[Manifest]) -> None:
    container(m)["securityContext"]["privileged"] = True


@breaks("CKV_K8S_37")
def capabilities_are_kept(m: list[Manifest]) -> None:
    del container(m)["securityContext"]["capabilities"]


@breaks("CKV_K8S_17")
def the_nodes_processes_are_seen(m: list[Manifest]) -> None:
    pod(m)["hostPID"] = True


@breaks("CKV_K8S_18")
def the_nodes_memory_is_shared(m: list[Manifest]) -> None:
    pod(m)["hostIPC"] = True


@breaks("CKV_K8S_25")
def a_capability_is_added(m: list[Manifest]) -> None:
    container(m)["securityContext"]["capabilities"]["add"] = ["SYS_PTRACE"]


@breaks("CKV_K8S_31")
def seccomp_is_off(m: list[Manifest]) -> None:
    pod(m)["securityContext"]["seccompProfile"] = {"type": "Unconfined"}


@breaks("CKV_K8S_19")
def the_nodes_network_is_used(m: list[Manifest]) -> None:
    reap(m)["hostNetwork"] = True


@breaks(pods.volumes_spare_the_node)
def a_folder_of_the_node_is_mounted(m: list[Manifest]) -> None:
    pod(m)["volumes"].append({"name": "docker", "hostPath": {"path": "/var/run"}})


@breaks("CKV_K8S_26")
def a_port_of_the_node_is_taken(m: list[Manifest]) -> None:
    container(m)["ports"] = [{"containerPort": 8265, "hostPort": 8265}]


@breaks("CKV_K8S_20")
def the_autoscaler_may_gain_privileges(m: list[Manifest]) -> None:
    del cluster(m)["autoscalerOptions"]["securityContext"]


@breaks("CKV_K8S_22")
def a_root_filesystem_is_writable(m: list[Manifest]) -> None:
    container(m)["securityContext"]["readOnlyRootFilesystem"] = False


@breaks(pods.volumes_spare_the_node)
def a_volume_may_fill_the_node(m: list[Manifest]) -> None:
    pod(m)["volumes"][0]["emptyDir"] = {}


@breaks(pods.ray_asks_for_what_it_takes)
def a_gpu_container_has_other_limits(m: list[Manifest]) -> None:
    container(m)["resources"]["limits"]["memory"] = "64Gi"


@breaks("CKV_K8S_13")
def a_container_has_no_requests(m: list[Manifest]) -> None:
    del reap(m)["containers"][0]["resources"]


@breaks(pods.memory_volumes_fit_in_memory)
def shared_memory_is_all_memory(m: list[Manifest]) -> None:
    pod(m)["volumes"][2]["emptyDir"]["sizeLimit"] = "48Gi"


@breaks("CKV_K8S_14", "kind")
def an_image_is_latest(m: list[Manifest]) -> None:
    container(m)["image"] = "fineloop/train:latest"


@breaks("CKV_K8S_14", "kind")
def an_image_has_no_tag(m: list[Manifest]) -> None:
    reap(m)["containers"][0]["image"] = "localhost:5000/fineloop/step-python"


@breaks(pods.images_have_a_digest)
def an_image_has_a_tag_alone(m: list[Manifest]) -> None:
    container(m)["image"] = "registry.invalid/fineloop/train:0.2.0"


@breaks(pods.what_pods_refer_to_exists)
def a_pod_takes_the_default_account(m: list[Manifest]) -> None:
    del pod(m)["serviceAccountName"]


@breaks("CKV_K8S_38")
def a_submitter_gets_a_token(m: list[Manifest]) -> None:
    job(m)["submitterPodTemplate"]["spec"]["automountServiceAccountToken"] = True


@breaks("CKV_K8S_38")
def a_trainer_gets_a_token(m: list[Manifest]) -> None:
    pod(m)["automountServiceAccountToken"] = True


@breaks("CKV_K8S_38")
def a_token_is_left_to_the_default(m: list[Manifest]) -> None:
    del pod(m)["automountServiceAccountToken"]


@breaks(pods.nothing_secret_is_written_down)
def a_secret_is_committed(m: list[Manifest]) -> None:
    m.append({"kind": "Secret", "metadata": {"name": "fineloop-s3"}})


@breaks(pods.nothing_secret_is_written_down)
def a_key_is_in_an_entrypoint(m: list[Manifest]) -> None:
    job(m)["entrypoint"] += " AKIA" + "A1B2" * 4


@breaks(pods.nothing_secret_is_written_down)
def a_token_is_in_the_environment(m: list[Manifest]) -> None:
    container(m)["env"].append({"name": "HF_TOKEN", "value": "anything"})


@breaks(pods.nothing_secret_is_written_down)
def a_secret_is_in_a_config_map(m: list[Manifest]) -> None:
    the(m, "ConfigMap")["data"]["AWS_SECRET_ACCESS_KEY"] = "anything"


@breaks(pods.no_pod_takes_a_sidecar)
def a_head_gets_a_sidecar(m: list[Manifest]) -> None:
    del cluster(m)["headGroupSpec"]["template"]["metadata"]["labels"]["sidecar.istio.io/inject"]


@breaks(pods.no_pod_takes_a_sidecar)
def the_reaper_gets_a_sidecar(m: list[Manifest]) -> None:
    the(m, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]["sidecar.istio.io/inject"] = (
        "true"
    )


@breaks(pods.what_pods_refer_to_exists)
def a_config_map_is_misspelt(m: list[Manifest]) -> None:
    container(m)["envFrom"][0]["configMapRef"]["name"] = "fineloop-environment"


@breaks(pods.what_pods_refer_to_exists)
def a_secret_is_nobodys(m: list[Manifest]) -> None:
    container(m)["envFrom"][1]["secretRef"]["name"] = "fineloop-s4"


@breaks(pods.what_pods_refer_to_exists)
def a_mounted_secret_is_nobodys(m: list[Manifest]) -> None:
    pod(m)["volumes"].append({"name": "key", "secret": {"secretName": "somebodys"}})


@breaks(pods.what_pods_refer_to_exists)
def a_mounted_config_map_is_nobodys(m: list[Manifest]) -> None:
    pod(m)["volumes"].append({"name": "config", "configMap": {"name": "somebodys"}})


@breaks(pods.what_pods_refer_to_exists)
def a_priority_does_not_exist(m: list[Manifest]) -> None:
    pod(m)["priorityClassName"] = "urgent"


@breaks(pods.what_pods_refer_to_exists, "kind")
def a_claim_does_not_exist(m: list[Manifest]) -> None:
    m.remove(the(m, "PersistentVolumeClaim"))
