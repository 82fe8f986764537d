"""Pods that a policy must refuse."""

from infra.checks.manifests import Manifest
from infra.checks.policies import pods
from tests.infra.mutations.breaks import breaks, cluster, container, job, pod, reap, the


@breaks(pods.pods_do_not_run_as_root)
def a_worker_may_be_root(m: list[Manifest]) -> None:
    del pod(m)["securityContext"]["runAsNonRoot"]


@breaks(pods.pods_do_not_run_as_root)
def a_container_is_root_again(m: list[Manifest]) -> None:
    container(m)["securityContext"]["runAsUser"] = 0


@breaks(pods.pods_do_not_run_as_root)
def an_init_container_is_root(m: list[Manifest]) -> None:
    pod(m)["initContainers"] = [{"name": "chown", "securityContext": {"runAsNonRoot": False}}]


@breaks(pods.pods_have_no_privileges)
def a_process_may_gain_privileges(m: list[Manifest]) -> None:
    container(m)["securityContext"]["allowPrivilegeEscalation"] = True


@breaks(pods.pods_have_no_privileges)
def a_capability_is_added(m: list[Manifest]) -> None:
    container(m)["securityContext"]["capabilities"]["add"] = ["SYS_PTRACE"]


@breaks(pods.pods_have_no_privileges)
def seccomp_is_off(m: list[Manifest]) -> None:
    pod(m)["securityContext"]["seccompProfile"] = {"type": "Unconfined"}


@breaks(pods.pods_have_no_privileges)
def the_nodes_network_is_used(m: list[Manifest]) -> None:
    reap(m)["hostNetwork"] = True


@breaks(pods.pods_have_no_privileges)
def a_folder_of_the_node_is_mounted(m: list[Manifest]) -> None:
    pod(m)["volumes"].append({"name": "docker", "hostPath": {"path": "/var/run"}})


@breaks(pods.pods_have_no_privileges)
def a_port_of_the_node_is_taken(m: list[Manifest]) -> None:
    container(m)["ports"] = [{"containerPort": 8265, "hostPort": 8265}]


@breaks(pods.pods_have_no_privileges)
def the_autoscaler_may_gain_privileges(m: list[Manifest]) -> None:
    del cluster(m)["autoscalerOptions"]["securityContext"]


@breaks(pods.root_filesystems_are_read_only)
def a_root_filesystem_is_writable(m: list[Manifest]) -> None:
    container(m)["securityContext"]["readOnlyRootFilesystem"] = False


@breaks(pods.volumes_cannot_fill_the_node)
def a_volume_may_fill_the_node(m: list[Manifest]) -> None:
    pod(m)["volumes"][0]["emptyDir"] = {}


@breaks(pods.containers_ask_for_what_they_take)
def a_gpu_container_has_other_limits(m: list[Manifest]) -> None:
    container(m)["resources"]["limits"]["memory"] = "64Gi"


@breaks(pods.containers_ask_for_what_they_take)
def a_container_has_no_requests(m: list[Manifest]) -> None:
    del reap(m)["containers"][0]["resources"]["requests"]


@breaks(pods.memory_volumes_fit_in_memory)
def shared_memory_is_all_memory(m: list[Manifest]) -> None:
    pod(m)["volumes"][2]["emptyDir"]["sizeLimit"] = "48Gi"


@breaks(pods.images_are_pinned, "kind")
def an_image_is_latest(m: list[Manifest]) -> None:
    container(m)["image"] = "fineloop/train:latest"


@breaks(pods.images_are_pinned, "kind")
def an_image_has_no_tag(m: list[Manifest]) -> None:
    reap(m)["containers"][0]["image"] = "localhost:5000/fineloop/step-python"


@breaks(pods.images_have_a_digest)
def an_image_has_a_tag_alone(m: list[Manifest]) -> None:
    container(m)["image"] = "registry.invalid/fineloop/train:0.1.0"


@breaks(pods.accounts_are_named)
def a_pod_takes_the_default_account(m: list[Manifest]) -> None:
    del pod(m)["serviceAccountName"]


@breaks(pods.accounts_are_named)
def a_submitter_gets_a_token(m: list[Manifest]) -> None:
    job(m)["submitterPodTemplate"]["spec"]["automountServiceAccountToken"] = True


@breaks(pods.accounts_are_named)
def a_trainer_gets_a_token(m: list[Manifest]) -> None:
    pod(m)["automountServiceAccountToken"] = True


@breaks(pods.accounts_are_named)
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
