"""The config's `ray` section: how many workers, which of two ways leads to their cluster, and the GPUs to plan for."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, StringConstraints, ValidationError, field_validator, model_validator

from components.config.section import Added, Section
from components.shared.errors import ConfigError

logger = logging.getLogger(__name__)

# The GPUs that a run can be planned for: memory, dense 16-bit rate and list price, each with its source.

GpuName = Literal["T4", "V100", "L4", "A10G", "A100-40G", "A100-80G", "L40S", "RTX4090", "H100", "H200"]

PRICED = "November 2026"


@dataclass(frozen=True)
class Gpu:
    """One GPU, from its maker's data sheet."""

    memory_gib: float
    """What the driver reports, in GiB: less than the data sheet's round number."""
    tflops: float
    """Dense 16-bit matrix rate with float32 sums, in 10^12 operations a second, without sparsity."""
    price_per_hour: float
    """US dollars, on demand, one GPU's part of the smallest machine that has it."""
    price_source: str
    capability: tuple[int, int]
    """Compute capability, by NVIDIA's table of its GPUs."""
    product: str
    """What NVIDIA's GPU feature discovery labels a node with, as nvidia.com/gpu.product."""
    is_calibrated: bool = False
    """Whether planned speeds were calibrated on published trainings on it."""


# Rates: NVIDIA's data sheets of each product (tensor cores, no sparsity). Prices: AWS, us-east-1, Linux, on demand, by
# instance; p4d, p4de and p5 as read on 2026-11-09, p5en on 2026-08-06, g5 in June 2026, the others as of 2025. The
# RTX 4090 is no data-centre product: RunPod, secure cloud, 2025. Labels: of the variant that is priced (SXM, not PCIe).
GPUS: dict[str, Gpu] = {
    "T4": Gpu(15.0, 65.0, 0.526, "AWS g4dn.xlarge", (7, 5), "Tesla-T4"),
    "V100": Gpu(15.8, 125.0, 3.06, "AWS p3.2xlarge", (7, 0), "Tesla-V100-SXM2-16GB"),
    "L4": Gpu(22.5, 121.0, 0.805, "AWS g6.xlarge", (8, 9), "NVIDIA-L4"),
    "A10G": Gpu(22.5, 70.0, 1.006, "AWS g5.xlarge", (8, 6), "NVIDIA-A10G"),
    "A100-40G": Gpu(39.6, 312.0, 2.74, "AWS p4d.24xlarge / 8", (8, 0), "NVIDIA-A100-SXM4-40GB", is_calibrated=True),
    "A100-80G": Gpu(79.3, 312.0, 3.43, "AWS p4de.24xlarge / 8", (8, 0), "NVIDIA-A100-SXM4-80GB", is_calibrated=True),
    "L40S": Gpu(45.0, 362.0, 1.861, "AWS g6e.xlarge", (8, 9), "NVIDIA-L40S"),
    "RTX4090": Gpu(24.0, 165.0, 0.69, "RunPod, secure cloud", (8, 9), "NVIDIA-GeForce-RTX-4090"),
    "H100": Gpu(79.6, 989.0, 6.88, "AWS p5.48xlarge / 8", (9, 0), "NVIDIA-H100-80GB-HBM3", is_calibrated=True),
    "H200": Gpu(140.4, 989.0, 7.91, "AWS p5en.48xlarge / 8", (9, 0), "NVIDIA-H200"),
}

# bfloat16 is preferred: it has float32's range and needs no loss scaling. GPUs before compute capability 8.0 (T4, V100)
# have no matrix units for it: PyTorch emulates it there, many times slower than their float16. The package flash-attn
# has no kernels for them at all.
FIRST_WITH_BFLOAT16 = FIRST_WITH_FLASH = (8, 0)


def dtype_on(wanted: str, capability: tuple[int, int] | None) -> Literal["bfloat16", "float16"]:
    """The 16-bit dtype of weights, activations and gradients on a GPU of this compute capability; None is a CPU, or a
    GPU that nobody has named. `wanted` is train.dtype."""
    if wanted == "auto":
        return "float16" if capability and capability < FIRST_WITH_BFLOAT16 else "bfloat16"
    return "float16" if wanted == "float16" else "bfloat16"


def without_flash(capability: tuple[int, int] | None) -> str:
    """Why a GPU of this compute capability has no flash attention; empty where it has."""
    if capability is None or capability >= FIRST_WITH_FLASH:
        return ""
    return (
        f"model.attention flash_attention_2: flash-attn has no kernels for a GPU of compute capability {capability[0]}."
        f"{capability[1]}, only from {FIRST_WITH_FLASH[0]}.{FIRST_WITH_FLASH[1]} (A100) on: set model.attention to auto"
    )


DnsName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
OptionalName = Annotated[str, StringConstraints(pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$")]
_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_DOMAIN = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?/"
LabelKey = Annotated[str, StringConstraints(pattern=rf"^({_DOMAIN})?{_NAME}$")]
LabelValue = Annotated[str, StringConstraints(pattern=rf"^({_NAME})?$")]
Quantity = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*(Ki|Mi|Gi|Ti)?$")]
OtherResource = Annotated[str, StringConstraints(pattern=rf"^(hugepages-[1-9][0-9]*[KMG]i|{_DOMAIN}{_NAME})$")]
IMAGE = "fineloop/train:0.2.0"
"""What `make images` builds of this release."""
Count = Annotated[int, Field(ge=1)]
NumWorkers = Count | Annotated[list[Count], Field(min_length=2, max_length=2)]
MatmulDtype = Literal["bfloat16", "float32"]
CpuMatmulDtype = Literal["auto"] | MatmulDtype
OF_EVERY_STEP = {"use_gpu", "cpu_matmul_dtype"}
"""Keys of this section that what a step computes depends on."""
NVIDIA_GPU = "nvidia.com/gpu"
EVALUATOR = "fineloop-evaluator"
"""ServiceAccount of the Ray pods that only evaluate."""

# TOKENIZERS_PARALLELISM and its like are settings, not tokens.
_SECRET = re.compile(r"KEY|SECRET|TOKEN(?!IZ)|PASSW|CREDENTIAL", re.IGNORECASE)
# The cluster's and Fineloop's own, and those by which webhooks give a pod a role of a cloud, or a vault's secrets.
_TAKEN = re.compile(r"(^|[.-])((kubernetes|k8s|kubeflow|ray|istio|fineloop)\.(io|org|dev)|(amazonaws|hashicorp)\.com)$")
_OURS = ("FINELOOP_IMAGE", "HOME", "PYTHONUNBUFFERED", "RAY_ADDRESS", "RAY_AUTH_MODE")

GIB = 2**30
QUEUE_TIMEOUT_S = 86_400
"""Longest wait in the queue; after it the job is given up."""
PRE_RUNNING_TIMEOUT_S = 1_800
"""Longest time for nodes, images and pods to become ready, once the job has left the queue and after a lost head."""
COLLECTIVE_TIMEOUT_S = 1_800
"""Timeout of collective operations, after which workers that cannot reach each other fail."""
TOPOLOGY = {True: "kueue.x-k8s.io/podset-required-topology", False: "kueue.x-k8s.io/podset-preferred-topology"}

# Taints that clouds put on spot nodes. EKS has none of its own; Karpenter's is for its users to choose.
SPOT = (
    {"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
    {"key": "fineloop.dev/spot", "operator": "Exists", "effect": "NoSchedule"},
)

_BY_NAME = ("env", "imagePullSecrets")
OF_0_1_0: Mapping[str, Any] = {
    "image_pull_secrets": [],
    "node_selector": {},
    "tolerations": [],
    "spot": False,
    "env": {},
}
"""Keys of a cluster that release 0.1.0 had and templates have replaced, with their defaults, which digests keep."""


def merged(base: Any, patch: Any, key: str = "") -> Any:
    """A strategic merge: tables by key, variables and pull secrets by name, the one container; other lists grow."""
    if isinstance(base, Mapping) and isinstance(patch, Mapping):
        return {**base, **{name: merged(base.get(name), value, name) for name, value in patch.items()}}
    if not (isinstance(base, list) and isinstance(patch, list)):
        return patch
    if key == "containers":
        return [merged((base or [{}])[0], patch[0])]
    if key in _BY_NAME:
        return [*({entry["name"]: entry for entry in [*base, *patch]}).values()]
    return [*base, *patch]


# What a template may set, in Kubernetes' words. All else of a pod is Fineloop's: the API server refuses a pod that is
# privileged or mounts its node, and this refuses what it would admit: another step's Secret or account, a second
# container, another command.


class Variable(Section):
    """A variable of the Ray container; none of ours, and no secret."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str

    @model_validator(mode="after")
    def _is_the_users(self) -> "Variable":
        if _SECRET.search(self.name):
            raise ValueError(
                f"{self.name} looks like a secret, and a config is no place for one: put it in Secret fineloop-s3"
            )
        if self.name in _OURS:
            raise ValueError(f"{self.name} is set by Fineloop: remove it")
        return self


class RayContainer(Section):
    """Of the one container of a Ray pod; what it requests it is limited to."""

    env: list[Variable] = []
    resources: dict[Literal["requests", "limits"], dict[OtherResource, Quantity]] = {}

    @model_validator(mode="after")
    def _requests_its_limits(self) -> "RayContainer":
        if self.resources.get("requests") != self.resources.get("limits"):
            raise ValueError(f"requests are not the limits, which Ray counts: {self.resources}")
        if NVIDIA_GPU in self.resources.get("limits", {}):
            raise ValueError(f"use_gpu and num_workers ask for {NVIDIA_GPU}: leave it out of resources")
        return self


class PodMetadata(Section):
    """Labels and annotations beside the cluster's and Fineloop's own."""

    labels: dict[LabelKey, LabelValue] = {}
    annotations: dict[LabelKey, str] = {}

    @model_validator(mode="after")
    def _are_not_ours(self) -> "PodMetadata":
        for key in [*self.labels, *self.annotations.keys() - TOPOLOGY.values()]:
            if _TAKEN.search(key.rpartition("/")[0]):
                raise ValueError(f"{key} belongs to the cluster or to Fineloop: choose a name of your own")
        return self


class PodSpec(Section):
    """Where a pod is placed, and what its container gets."""

    affinity: dict[str, Any] = {}
    containers: Annotated[list[RayContainer], Field(min_length=1, max_length=1)] = [RayContainer()]
    imagePullSecrets: list[dict[Literal["name"], DnsName]] = []
    nodeSelector: dict[str, str] = {}
    priorityClassName: OptionalName = ""
    runtimeClassName: OptionalName = ""
    schedulerName: OptionalName = ""
    tolerations: list[dict[str, Any]] = []
    topologySpreadConstraints: list[dict[str, Any]] = []


class PodTemplateSpec(Section):
    """What is merged into a Ray pod."""

    metadata: PodMetadata = PodMetadata()
    spec: PodSpec = PodSpec()


POD, WORKER = "pod_template", "worker_template"
OLD_KEYS: Mapping[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "labels": (POD, lambda labels: {"metadata": {"labels": labels}}),
    "pod_priority_class": (POD, lambda name: {"spec": {"priorityClassName": name}}),
    "image_pull_secrets": (POD, lambda names: {"spec": {"imagePullSecrets": [{"name": name} for name in names]}}),
    "env": (POD, lambda env: {"spec": {"containers": [{"env": [{"name": k, "value": v} for k, v in env.items()]}]}}),
    "topology": (WORKER, lambda annotations: {"metadata": {"annotations": annotations}}),
    "node_selector": (WORKER, lambda labels: {"spec": {"nodeSelector": labels}}),
    "tolerations": (WORKER, lambda those: {"spec": {"tolerations": [{"operator": "Exists", **one} for one in those]}}),
    "spot": (WORKER, lambda _: {"spec": {"tolerations": [*SPOT]}}),
    "worker.resources": (WORKER, lambda of: {"spec": {"containers": [{"resources": {"requests": of, "limits": of}}]}}),
}
"""The keys of a cluster that templates have replaced, read for one release: which template, and what it says there."""


def _mergeable(template: dict[str, Any]) -> dict[str, Any]:
    try:
        PodTemplateSpec.model_validate(template)
    except ValidationError as exc:
        problems = []
        for error in exc.errors():
            message = "is not merged into Ray's pods" if error["type"] == "extra_forbidden" else error["msg"]
            problems.append(f"{'.'.join(map(str, error['loc']))}: {message}")
        raise ValueError("; ".join(problems)) from exc
    return template


PodTemplate = Annotated[dict[str, Any], AfterValidator(_mergeable), Added("0.2.0")]


class JobsApiCluster(Section):
    """A Ray cluster that exists already, reached through its Jobs API at RAY_ADDRESS; here, the local head."""

    kind: Literal["jobs-api"] = "jobs-api"
    """A cluster that exists already; its address comes from RAY_ADDRESS."""
    has_address: ClassVar[bool] = True
    image: ClassVar[str] = ""
    ca_bundle: ClassVar[str] = ""
    pod_labels: ClassVar[dict[str, str]] = {}
    disk_gib: ClassVar[int | None] = None
    accounts: ClassVar[tuple[str, ...]] = ()

    def require_room(self, *, num_workers: int, cpus_per_worker: int) -> None:
        """None: the cluster is not known before a job runs on it."""

    def pods(self, num_workers: int) -> int:
        return num_workers

    def worker_bytes(self, num_workers: int) -> int | None:
        """None, as for all that depends on pods."""


class WorkerPod(Section):
    """What one worker pod asks for, and no more than that: its requests are its limits."""

    cpu: Annotated[int, Field(ge=1)] = 4
    """CPU cores."""
    memory_gib: Annotated[int, Field(ge=2)] = 24
    """Memory in GiB, shared memory included: a third of it, 8 GiB at most."""

    @property
    def shared_memory_gib(self) -> int:
        """/dev/shm, for NCCL, data loading and Ray's object store."""
        return min(8, max(1, self.memory_gib // 3))


class HeadPod(Section):
    """What the head asks for, and no more than that: as many cores as a worker's pod, 2 at most."""

    memory_gib: Annotated[int, Field(ge=2)] = 8
    """Memory in GiB. The job's own process runs here: it tokenizes, plans and publishes."""


class RayJobCluster(Section):
    """A cluster of each job's own on Kubernetes: a RayJob that KubeRay starts, and Kueue lets in when there is room."""

    kind: Literal["rayjob"]
    """A cluster that KubeRay creates for the job and deletes after it."""
    has_address: ClassVar[bool] = False
    image: Annotated[str, StringConstraints(pattern=r"^\S+$")] = IMAGE
    """Image of every Ray pod, with a tag other than latest or a digest."""
    namespace: OptionalName = ""
    """Namespace of the RayJob; empty means the namespace of the pod that submits it."""
    service_account: DnsName = "fineloop-trainer"
    """ServiceAccount of the Ray pods; those that only evaluate have fineloop-evaluator where registry.trusted_keys are
    set."""
    queue: OptionalName = "fineloop"
    """Kueue's LocalQueue; empty runs without Kueue."""
    priority_class: OptionalName = ""
    """Kueue's WorkloadPriorityClass; empty means the queue's default."""
    ca_bundle: Annotated[OptionalName, Added("0.2.0")] = ""
    """A ConfigMap whose key ca.crt holds every certificate authority that Ray pods and steps trust, yours and the
    public ones: it takes the place of the images' own."""
    nodes: Annotated[int, Field(ge=0)] = 0
    """Number of worker pods, over which ray.num_workers is divided evenly; 0 means one pod for each worker."""
    worker: WorkerPod = WorkerPod()
    """Size of a worker pod; its GPUs, one for each of its workers, come on top."""
    head: HeadPod = HeadPod()
    """Size of the head, where no training runs."""
    disk_gib: Annotated[int, Field(ge=1)] = 100
    """Limit in GiB on what a Ray pod writes to /tmp, and the same again to its home; beyond it, the pod is evicted. One
    of the two holds the base model, 2 GiB for each billion of parameters; /tmp also holds Ray's session and spilled
    objects."""
    pod_template: PodTemplate = {}
    """What is merged into every Ray pod, as in a PodTemplateSpec of Kubernetes: metadata.labels (steps and RayJob get
    them too), spec.priorityClassName, spec.imagePullSecrets, and env of the one item of spec.containers. No secrets."""
    worker_template: PodTemplate = {}
    """The same for workers alone: spec.tolerations such as a spot pool's, spec.nodeSelector instead of the
    nvidia.com/gpu.product that belongs to ray.gpu, or further resources, which the ClusterQueue must cover."""

    @model_validator(mode="before")
    @classmethod
    def _in_the_words_of_templates(cls, values: Any) -> Any:
        """Accept, for one release, the ten keys that the two templates have replaced."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        old = {key: value for key in OLD_KEYS if (value := values.pop(key, None))}
        is_required = bool(values.pop("topology_required", False))
        if "topology" in old:
            old["topology"] = {TOPOLOGY[is_required]: old["topology"]}
        if isinstance(worker := values.get("worker"), dict) and "resources" in worker:
            values["worker"] = {key: value for key, value in worker.items() if key != "resources"}
            old |= {"worker.resources": worker["resources"]} if worker["resources"] else {}
        for key, value in old.items():
            template, in_its_words = OLD_KEYS[key]
            logger.warning("ray.cluster.%s: read for this release only: use ray.cluster.%s", key, template)
            try:
                values[template] = merged(in_its_words(value), values.get(template, {}))
            except (AttributeError, TypeError) as exc:
                raise ValueError(f"{key} cannot be read ({exc}): use {template}") from exc
        return values

    @field_validator("image")
    @classmethod
    def _is_pinned(cls, image: str) -> str:
        name, _, digest = image.partition("@")
        tag = name.rpartition("/")[2].partition(":")[2]
        if not digest and tag in ("", "latest"):
            raise ValueError(f"{image!r} means another image tomorrow: give it a tag other than latest, or a digest")
        return image

    @property
    def pod_labels(self) -> dict[str, str]:
        return dict(self.pod_template.get("metadata", {}).get("labels", {}))

    @property
    def accounts(self) -> tuple[str, ...]:
        return self.service_account, EVALUATOR

    def pods(self, num_workers: int) -> int:
        return self.nodes or num_workers

    def worker_bytes(self, num_workers: int) -> int | None:
        return self.worker.memory_gib * GIB * self.pods(num_workers) // num_workers

    def require_room(self, *, num_workers: int, cpus_per_worker: int) -> None:
        """Refuse workers that its pods could not hold. Raises ValueError: they cannot be shared out evenly, or a pod
        has too few CPUs."""
        per_pod, left_over = divmod(num_workers, self.pods(num_workers))
        if left_over:
            raise ValueError(
                f"num_workers {num_workers} cannot be shared out evenly among cluster.nodes {self.nodes}: "
                "make it a multiple"
            )
        if self.worker.cpu < per_pod * cpus_per_worker:
            raise ValueError(
                f"cluster.worker.cpu {self.worker.cpu} is less than the {per_pod * cpus_per_worker} that "
                f"cpus_per_worker {cpus_per_worker} asks for with {per_pod} workers in a pod"
            )


Cluster = Annotated[JobsApiCluster | RayJobCluster, Field(discriminator="kind")]
"""Each says whether RAY_ADDRESS names it, how long a job may wait in its queue, which workers it cannot hold, and what
its pods have: None where Fineloop creates none."""
CLUSTERS: Mapping[str, type[Section]] = {"jobs-api": JobsApiCluster, "rayjob": RayJobCluster}
"""The same, by their kind."""


class RayConfig(Section):
    """The Ray Train workers."""

    num_workers: NumWorkers = 1
    """Worker processes, one per GPU where GPUs are used. A run may be resumed with more or fewer. [min, max] is
    elastic: training starts with as many workers as there is room for, at least min. It continues with fewer when one
    is lost, and with more when there is room again."""
    use_gpu: bool = False
    """Give each worker one GPU, with NCCL; otherwise CPU processes with gloo."""
    gpu: GpuName | None = None
    """The GPU to plan for, when use_gpu is on; absent means the one that the cluster provides."""
    gpu_price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Your price of one GPU for an hour, in US dollars; absent means a public list price, which `fineloop plan` names
    with its date."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPU cores reserved for each worker."""
    cpu_matmul_dtype: Annotated[CpuMatmulDtype, Added("0.2.0")] = "auto"
    """dtype of matrix products on CPU workers. auto measures, and uses float32 if the processor is slow in bfloat16;
    weights are still stored in 16 bits or fewer."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """How often lost workers are restarted from the newest checkpoint."""
    timeout_s: Annotated[int, Field(ge=60)] = 86_400
    """Deadline of preparing the data, and of each Ray job of a run (training and evaluation), from when it may start;
    past it, it is stopped."""
    cluster: Cluster = JobsApiCluster()
    """Which cluster: kind jobs-api is an existing one, rayjob creates one for each job on Kubernetes."""

    @model_validator(mode="after")
    def _cluster_holds_the_workers(self) -> "RayConfig":
        if self.gpu == "V100" and self.cluster.image == IMAGE:
            raise ValueError(
                f"gpu V100: PyTorch in cluster.image {IMAGE} is built for CUDA 13, which has no kernels for it: take "
                "gpu=T4 or a newer one, or an image with PyTorch for CUDA 12"
            )
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers {self.num_workers} is [min, max]: put the smaller number first")
        self.cluster.require_room(num_workers=self.max_workers, cpus_per_worker=self.cpus_per_worker)
        return self

    def for_data(self) -> "RayConfig":
        """Settings of the job that prepares the data: no GPU, and a worker for each of its pods."""
        changes: dict[str, Any] = {"use_gpu": False, "gpu": None}
        if isinstance(self.cluster, RayJobCluster):
            pods = min(8, max(2, self.cluster.pods(self.max_workers)))
            sizes = {"nodes": pods, "worker": WorkerPod(cpu=4, memory_gib=16), "worker_template": {}}
            changes |= {"cluster": self.cluster.model_copy(update=sizes), "num_workers": pods}
        return self.model_copy(update=changes)

    def for_evaluation(self) -> "RayConfig":
        """Settings of a job that only evaluates: its pods have an account of their own."""
        if not isinstance(self.cluster, RayJobCluster):
            return self
        apart = self.cluster.model_copy(update={"service_account": EVALUATOR})
        return self.model_copy(update={"cluster": apart})

    def require_disk(self, base: str, needed: int) -> None:
        """Refuse a base that the disk of a pod does not hold; `needed` in bytes. Raises ConfigError: it is more than
        `disk_gib`."""
        disk_gib = self.cluster.disk_gib
        if disk_gib is not None and needed > disk_gib * GIB:
            raise ConfigError(
                f"each pod downloads {base} and writes {needed / GIB:.0f} GiB to its disk, and ray.cluster.disk_gib is "
                f"{disk_gib}, beyond which it is evicted: set ray.cluster.disk_gib={-(-needed * 5 // (4 * GIB))}"
            )

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability of the workers' GPU; None for processors, or a GPU that nobody has named."""
        return GPUS[self.gpu].capability if self.use_gpu and self.gpu else None

    @property
    def is_elastic(self) -> bool:
        return self.min_workers < self.max_workers

    @property
    def per_worker(self) -> dict[str, float]:
        """What Ray sets aside for each worker, by its names of resources."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1} if self.use_gpu else {})}

    @property
    def patience_s(self) -> int:
        """The longest that a step waits for one job, queue included: what its own timeout must exceed."""
        return self.timeout_s + (0 if self.cluster.has_address else QUEUE_TIMEOUT_S)


# What an hour of a GPU costs.


def price_per_hour(ray: RayConfig, gpu: str) -> tuple[float, str] | None:
    """US dollars and where they are from: the config's price, or the list's for the product that a worker names."""
    if not gpu:
        return None
    if ray.gpu_price_per_hour is not None:
        return ray.gpu_price_per_hour, "ray.gpu_price_per_hour"
    listed = next((row for row in GPUS.values() if row.product.replace("-", " ") == gpu), None)
    listed = listed or (GPUS[ray.gpu] if ray.gpu else None)
    return (listed.price_per_hour, f"{listed.price_source}, {PRICED}") if listed else None
