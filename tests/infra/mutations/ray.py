"""RayJobs and RayClusters that a policy must refuse."""

from infra.checks.manifests import Manifest
from infra.checks.policies import ray
from tests.infra.mutations.breaks import breaks, cluster, container, job, the, workers


@breaks(ray.kuberay_takes_the_jobs)
def a_head_restarts_in_sidecar_mode(m: list[Manifest]) -> None:
    job(m)["submissionMode"] = "SidecarMode"
    job(m)["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["restartPolicy"] = "Always"


@breaks(ray.kuberay_takes_the_clusters)
def a_name_is_too_long(m: list[Manifest]) -> None:
    the(m, "RayJob")["metadata"]["name"] = "a" * 48


@breaks(ray.kuberay_takes_the_clusters)
def a_name_begins_with_a_digit(m: list[Manifest]) -> None:
    the(m, "RayCluster")["metadata"]["name"] = "1-cluster"


@breaks(ray.kuberay_takes_the_clusters)
def two_groups_have_one_name(m: list[Manifest]) -> None:
    cluster(m)["workerGroupSpecs"] *= 2


@breaks(ray.kuberay_takes_the_clusters)
def a_group_has_no_container(m: list[Manifest]) -> None:
    cluster(m)["headGroupSpec"]["template"]["spec"]["containers"] = []


@breaks(ray.kuberay_takes_the_clusters)
def resources_are_given_twice(m: list[Manifest]) -> None:
    cluster(m)["headGroupSpec"]["resources"] = {"CPU": "0"}


@breaks(ray.kuberay_takes_the_clusters)
def replicas_are_out_of_range(m: list[Manifest]) -> None:
    cluster(m)["workerGroupSpecs"][0]["replicas"] = 3


@breaks(ray.kuberay_takes_the_clusters)
def the_old_autoscaler_is_chosen(m: list[Manifest]) -> None:
    cluster(m)["autoscalerOptions"]["version"] = "v1"


@breaks(ray.kuberay_takes_the_clusters)
def an_autoscaled_pod_restarts(m: list[Manifest]) -> None:
    cluster(m)["workerGroupSpecs"][0]["template"]["spec"]["restartPolicy"] = "Always"


@breaks(ray.no_pod_of_kuberays_own_is_refused)
def the_default_submitter_is_used(m: list[Manifest]) -> None:
    del job(m)["submitterPodTemplate"]


@breaks(ray.no_pod_of_kuberays_own_is_refused)
def a_sidecar_submits(m: list[Manifest]) -> None:
    job(m)["submissionMode"] = "SidecarMode"


@breaks(ray.kueue_takes_the_jobs)
def a_job_goes_round_the_queue(m: list[Manifest]) -> None:
    del the(m, "RayJob")["metadata"]["labels"][ray.QUEUE]


@breaks(ray.kueue_takes_the_jobs)
def a_priority_is_misspelt(m: list[Manifest]) -> None:
    the(m, "RayJob")["metadata"]["labels"][ray.PRIORITY] = "fineloop-ad-hoc"


@breaks(ray.kueue_takes_the_jobs)
def a_cluster_outlives_its_job(m: list[Manifest]) -> None:
    job(m)["shutdownAfterJobFinishes"] = False


@breaks(ray.kueue_takes_the_jobs)
def a_queued_job_has_deletion_rules(m: list[Manifest]) -> None:
    job(m)["deletionStrategy"] = {}


@breaks(ray.kueue_takes_the_jobs)
def a_queued_job_names_a_cluster(m: list[Manifest]) -> None:
    job(m)["clusterSelector"] = {"ray.io/cluster": "fineloop-experiments"}


@breaks(ray.kueue_takes_the_jobs)
def a_job_suspends_itself(m: list[Manifest]) -> None:
    job(m)["suspend"] = False


@breaks(ray.kueue_takes_the_jobs)
def a_queued_job_scales(m: list[Manifest]) -> None:
    job(m)["rayClusterSpec"]["enableInTreeAutoscaling"] = True


@breaks(ray.kueue_takes_the_jobs)
def a_job_has_too_many_groups(m: list[Manifest]) -> None:
    job(m)["rayClusterSpec"]["workerGroupSpecs"] *= 18


@breaks(ray.jobs_are_gangs)
def a_gang_may_shrink(m: list[Manifest]) -> None:
    workers(m)["minReplicas"] = 1


@breaks(ray.jobs_are_gangs)
def a_head_works_too(m: list[Manifest]) -> None:
    del job(m)["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"]


@breaks(ray.jobs_end)
def a_job_has_no_deadline(m: list[Manifest]) -> None:
    del job(m)["activeDeadlineSeconds"]


@breaks(ray.jobs_fit_in_the_queue)
def a_job_is_larger_than_its_queue(m: list[Manifest]) -> None:
    workers(m).update(replicas=9, minReplicas=9, maxReplicas=9)


@breaks(ray.jobs_fit_in_the_queue)
def a_queue_is_larger_than_the_quota(m: list[Manifest]) -> None:
    the(m, "ResourceQuota")["spec"]["hard"]["requests.nvidia.com/gpu"] = "7"


@breaks(ray.jobs_fit_in_the_queue)
def a_quota_does_not_count_gpus(m: list[Manifest]) -> None:
    del the(m, "ResourceQuota")["spec"]["hard"]["requests.nvidia.com/gpu"]


@breaks(ray.flavors_ask_for_no_label_of_the_gpu_operator)
def a_flavor_asks_for_a_label_that_few_nodes_have(m: list[Manifest]) -> None:
    the(m, "ResourceFlavor")["spec"]["nodeLabels"] = {"nvidia.com/gpu.present": "true"}


@breaks(ray.clusters_ask_for_a_token)
def a_dashboard_is_open(m: list[Manifest]) -> None:
    job(m)["rayClusterSpec"]["authOptions"]["mode"] = "disabled"


@breaks(ray.clusters_ask_for_a_token)
def a_shared_dashboard_is_open(m: list[Manifest]) -> None:
    del cluster(m)["authOptions"]


@breaks(ray.versions_agree)
def a_cluster_has_another_ray(m: list[Manifest]) -> None:
    cluster(m)["rayVersion"] = "2.59.0"


@breaks(ray.versions_agree, "kind")
def an_image_is_of_another_release(m: list[Manifest]) -> None:
    container(m)["image"] = "fineloop/train:0.0.9"
