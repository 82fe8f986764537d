"""Check an overlay before it is applied: `python -m infra.checks aws`.

Schemas, policies, and that the placeholders of the committed overlay have been filled in. What is not checked, because
nobody fetched its definition, is named.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator

from infra.checks import schemas
from infra.checks.manifests import INFRA, Manifest, render_overlay, title
from infra.checks.policies import access, pods, ray

Policy = Callable[[list[Manifest]], Iterable[str]]

POLICIES: tuple[Policy, ...] = (
    pods.volumes_spare_the_node,
    pods.no_pod_takes_a_sidecar,
    pods.memory_volumes_fit_in_memory,
    pods.ray_asks_for_what_it_takes,
    pods.nothing_secret_is_written_down,
    pods.what_pods_refer_to_exists,
    ray.kuberay_takes_the_jobs,
    ray.kuberay_takes_the_clusters,
    ray.no_pod_of_kuberays_own_is_refused,
    ray.kueue_takes_the_jobs,
    ray.jobs_are_gangs,
    ray.jobs_end,
    ray.jobs_fit_in_the_queue,
    ray.flavors_ask_for_no_label_of_the_gpu_operator,
    ray.clusters_ask_for_a_token,
    ray.no_job_has_a_kubernetes_token,
    ray.versions_agree,
    access.accounts_have_their_rights_and_no_other,
    access.people_read_no_secret,
    access.rights_end_at_the_namespace,
    access.everything_is_in_the_namespace,
    access.the_namespace_is_restricted,
    access.the_quota_closes_the_ways_out,
    access.services_stay_inside,
    access.promoting_takes_another_role_than_training,
)
PLACEHOLDERS = {
    "registry.invalid": "the registry of your images, in images/kustomization.yaml",
    "0" * 64: "the digest of an image that you pushed, in images/kustomization.yaml",
    "s3.invalid": "the URL of your store, in kustomization.yaml",
    "owner@users.invalid": "the user whose profile this is, in kubeflow/profile/kustomization.yaml",
    "203.0.113.10": "the address of your store, in s3.yaml",
    "000000000000": "your AWS account, in account/kustomization.yaml",
}
"""Placeholders in the committed overlays, all of them reserved names, and what to put in their place."""


def policies_of(overlay: str) -> tuple[Policy, ...]:
    """The policies of an overlay. Images of `kind` and of `team` on it come from no registry and need no digest."""
    return POLICIES if overlay in ("kind", "team") else (*POLICIES, pods.images_have_a_digest)


def violations(manifests: list[Manifest], policies: Iterable[Policy]) -> Iterator[str]:
    """Yield what the manifests do that policies forbid, each with the policy's name."""
    for policy in policies:
        for found in policy(manifests):
            yield f"{policy.__name__}: {found}"


def placeholders(manifests: list[Manifest]) -> Iterator[str]:
    """The placeholders that are not filled in yet."""
    for manifest in manifests:
        text = repr(manifest)
        for placeholder, meaning in PLACEHOLDERS.items():
            if placeholder in text:
                yield f"{title(manifest)}: {placeholder[:16]} stands for {meaning}"
                text = text.replace(placeholder, "")


def main() -> int:
    """Print what is wrong; return 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m infra.checks", description=__doc__)
    parser.add_argument("overlay", choices=sorted(folder.name for folder in (INFRA / "overlays").iterdir()))
    overlay = parser.parse_args().overlay
    manifests = render_overlay(overlay)
    crds = schemas.crds_folder()
    found = [f"{title(manifest)}: {error}" for manifest in manifests for error in schemas.errors(manifest, crds)]
    found += [*violations(manifests, policies_of(overlay)), *placeholders(manifests)]
    print("\n".join(found) or f"infra/overlays/{overlay}: {len(manifests)} objects, nothing wrong")
    if unchecked := [title(manifest) for manifest in manifests if not schemas.is_checked(manifest, crds)]:
        print(f"fields not checked, for want of their definitions ({schemas.HOW}): {', '.join(unchecked)}")
    return 1 if found else 0
