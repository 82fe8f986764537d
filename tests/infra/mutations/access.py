"""Rights, quotas and services that a policy must refuse."""

from infra.checks.manifests import Manifest
from infra.checks.policies import access
from tests.infra.mutations.breaks import breaks, the


@breaks(access.accounts_have_their_rights_and_no_other)
def a_trainer_gets_rights(m: list[Manifest]) -> None:
    binding = the(m, "RoleBinding", "fineloop-reaper")
    binding["subjects"].append(binding["subjects"][0] | {"name": "fineloop-trainer"})


@breaks(access.accounts_have_their_rights_and_no_other)
def a_step_may_enter_pods(m: list[Manifest]) -> None:
    the(m, "Role", "fineloop-pipeline")["rules"][1]["resources"].append("pods/exec")


@breaks(access.accounts_have_their_rights_and_no_other)
def a_step_may_read_every_secret(m: list[Manifest]) -> None:
    del the(m, "Role", "fineloop-kubeflow-run")["rules"][2]["resourceNames"]


@breaks(access.accounts_have_their_rights_and_no_other)
def a_reaper_may_start_jobs(m: list[Manifest]) -> None:
    the(m, "Role", "fineloop-reaper")["rules"][0]["verbs"].append("create")


@breaks(access.accounts_have_their_rights_and_no_other)
def a_step_cannot_start_jobs(m: list[Manifest]) -> None:
    the(m, "Role", "fineloop-pipeline")["rules"][0]["verbs"].remove("create")


@breaks(access.rights_end_at_the_namespace)
def a_role_has_a_wildcard(m: list[Manifest]) -> None:
    the(m, "Role", "fineloop-reaper")["rules"][0]["verbs"] = ["*"]


@breaks(access.rights_end_at_the_namespace)
def a_role_holds_everywhere(m: list[Manifest]) -> None:
    the(m, "Role", "fineloop-reaper")["kind"] = "ClusterRole"


@breaks(access.rights_end_at_the_namespace)
def a_stranger_is_bound(m: list[Manifest]) -> None:
    the(m, "RoleBinding")["subjects"][0]["namespace"] = "default"


@breaks(access.everything_is_in_the_namespace)
def an_object_has_no_namespace(m: list[Manifest]) -> None:
    del the(m, "LimitRange")["metadata"]["namespace"]


@breaks(access.the_namespace_is_restricted)
def the_namespace_takes_any_pod(m: list[Manifest]) -> None:
    the(m, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "baseline"


@breaks(access.the_namespace_is_restricted)
def the_namespace_has_no_default_limits(m: list[Manifest]) -> None:
    m.remove(the(m, "LimitRange"))


@breaks(access.the_quota_closes_the_ways_out)
def a_load_balancer_is_allowed(m: list[Manifest]) -> None:
    del the(m, "ResourceQuota")["spec"]["hard"]["services.loadbalancers"]


@breaks(access.the_quota_closes_the_ways_out)
def pods_are_not_counted(m: list[Manifest]) -> None:
    del the(m, "ResourceQuota")["spec"]["hard"]["pods"]


@breaks(access.services_stay_inside, "kind")
def a_service_is_published(m: list[Manifest]) -> None:
    the(m, "Service")["spec"]["type"] = "NodePort"


@breaks(access.services_stay_inside)
def an_ingress_appears(m: list[Manifest]) -> None:
    m.append({"kind": "Ingress", "metadata": {"name": "dashboard"}})


@breaks(access.promoting_takes_another_role_than_training)
def a_trainer_has_the_promoters_role(m: list[Manifest]) -> None:
    promoter = the(m, "ServiceAccount", "fineloop-pipeline")["metadata"]["annotations"]
    the(m, "ServiceAccount", "fineloop-trainer")["metadata"]["annotations"] = promoter


@breaks(access.promoting_takes_another_role_than_training)
def a_shared_clusters_head_has_no_role(m: list[Manifest]) -> None:
    del the(m, "ServiceAccount", "fineloop-experiments")["metadata"]["annotations"]


@breaks(access.promoting_takes_another_role_than_training)
def a_promoter_has_no_role(m: list[Manifest]) -> None:
    del the(m, "ServiceAccount", "fineloop-pipeline")["metadata"]["annotations"]


@breaks(access.promoting_takes_another_role_than_training)
def a_shared_cluster_has_the_promoters_role(m: list[Manifest]) -> None:
    promoter = the(m, "ServiceAccount", "fineloop-pipeline")["metadata"]["annotations"]
    the(m, "ServiceAccount", "fineloop-experiments")["metadata"]["annotations"] = promoter
