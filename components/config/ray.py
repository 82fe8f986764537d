"""The config's `ray` section: how many workers, which of two ways leads to their cluster, and the GPUs to plan for."""

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from components.config.section import Added, Section
from components.shared.errors import ConfigError

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
    product: str
    """What NVIDIA's GPU feature discovery labels a node with, as nvidia.com/gpu.product."""
    is_calibrated: bool = False
    """Whether planned speeds were calibrated on published trainings on it."""
    has_bf16: bool = True
    """Whether its matrix units know bfloat16; where not, trainings are in float16."""


# Rates: NVIDIA's data sheets of each product (tensor cores, no sparsity). Prices: AWS, us-east-1, Linux, on demand, by
# instance; p4d, p4de and p5 as read on 2026-11-09, p5en on 2026-08-06, g5 in June 2026, the others as of 2025. The
# RTX 4090 is no data-centre product: RunPod, secure cloud, 2025. Labels: of the variant that is priced (SXM, not PCIe).
GPUS: dict[str, Gpu] = {
    "T4": Gpu(15.0, 65.0, 0.526, "AWS g4dn.xlarge", "Tesla-T4", has_bf16=False),
    "V100": Gpu(15.8, 125.0, 3.06, "AWS p3.2xlarge", "Tesla-V100-SXM2-16GB", has_bf16=False),
    "L4": Gpu(22.5, 121.0, 0.805, "AWS g6.xlarge", "NVIDIA-L4"),
    "A10G": Gpu(22.5, 70.0, 1.006, "AWS g5.xlarge", "NVIDIA-A10G"),
    "A100-40G": Gpu(39.6, 312.0, 2.74, "AWS p4d.24xlarge / 8", "NVIDIA-A100-SXM4-40GB", is_calibrated=True),
    "A100-80G": Gpu(79.3, 312.0, 3.43, "AWS p4de.24xlarge / 8", "NVIDIA-A100-SXM4-80GB", is_calibrated=True),
    "L40S": Gpu(45.0, 362.0, 1.861, "AWS g6e.xlarge", "NVIDIA-L40S"),
    "RTX4090": Gpu(24.0, 165.0, 0.69, "RunPod, secure cloud", "NVIDIA-GeForce-RTX-4090"),
    "H100": Gpu(79.6, 989.0, 6.88, "AWS p5.48xlarge / 8", "NVIDIA-H100-80GB-HBM3", is_calibrated=True),
    "H200": Gpu(140.4, 989.0, 7.91, "AWS p5en.48xlarge / 8", "NVIDIA-H200"),
}


DnsName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
OptionalName = Annotated[str, StringConstraints(pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$")]
_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_DOMAIN = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?/"
LabelKey = Annotated[str, StringConstraints(pattern=rf"^({_DOMAIN})?{_NAME}$")]
LabelValue = Annotated[str, StringConstraints(pattern=rf"^({_NAME})?$")]
Quantity = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*(Ki|Mi|Gi|Ti)?$")]
OtherResource = Annotated[str, StringConstraints(pattern=rf"^(hugepages-[1-9][0-9]*[KMG]i|{_DOMAIN}{_NAME})$")]
ResourceName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9][A-Za-z0-9._-]*$")]
IMAGE = "fineloop/train:0.2.0"
"""What `make images` builds of this release."""
Count = Annotated[int, Field(ge=1)]
NumWorkers = Count | Annotated[list[Count], Field(min_length=2, max_length=2)]
MatmulDtype = Literal["bfloat16", "float32"]
CpuMatmulDtype = Literal["auto"] | MatmulDtype
OF_EVERY_STEP = {"use_gpu", "cpu_matmul_dtype"}
"""Keys of this section that what a step computes depends on."""
NVIDIA_GPU = "nvidia.com/gpu"

# TOKENIZERS_PARALLELISM and its like are settings, not tokens.
_SECRET = re.compile(r"KEY|SECRET|TOKEN(?!IZ)|PASSW|CREDENTIAL", re.IGNORECASE)
_TAKEN = re.compile(r"(^|[.-])(kubernetes|k8s|kubeflow|ray|istio|fineloop)\.(io|org|dev)$")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = ("FINELOOP_IMAGE", "HOME", "PYTHONUNBUFFERED", "RAY_ADDRESS", "RAY_AUTH_MODE")

GIB = 2**30


class JobsApiCluster(Section):
    """A Ray cluster that exists already, reached through its Jobs API at RAY_ADDRESS; here, the local head."""

    kind: Literal["jobs-api"] = "jobs-api"
    """A cluster that exists already; its address comes from RAY_ADDRESS."""
    has_address: ClassVar[bool] = True
    image: ClassVar[str] = ""
    ca_bundle: ClassVar[str] = ""
    labels: ClassVar[dict[str, str]] = {}
    queue_timeout_s: ClassVar[int] = 0

    def require_room(self, *, num_workers: int, cpus_per_worker: int) -> None:
        """None: the cluster is not known before a job runs on it."""

    def for_data(self) -> "JobsApiCluster":
        """Itself."""
        return self


class WorkerPod(Section):
    """What one worker pod asks for, and no more than that: its requests are its limits."""

    cpu: Annotated[int, Field(ge=1)] = 4
    """CPU cores."""
    memory_gib: Annotated[int, Field(ge=2)] = 24
    """Memory in GiB, shared memory included."""
    resources: Annotated[dict[OtherResource, Quantity], Added("0.2.0")] = {}
    """Further resources of a pod, such as "vpc.amazonaws.com/efa" = "4" or "hugepages-2Mi" = "5Gi"; the ClusterQueue
    must cover each of them."""


class HeadPod(Section):
    """What the head asks for, and no more than that."""

    cpu: Annotated[int, Field(ge=1)] = 2
    """CPU cores."""
    memory_gib: Annotated[int, Field(ge=2)] = 8
    """Memory in GiB. The job's own process runs here: it tokenizes, plans and publishes."""


class DataPods(Section):
    """What the pods ask for that prepare the data where data.engine is ray; none has a GPU."""

    pods: Annotated[int, Field(ge=1)] = 2
    """Number of pods."""
    cpu: Annotated[int, Field(ge=1)] = 4
    """CPU cores of each."""
    memory_gib: Annotated[int, Field(ge=4)] = 16
    """Memory of each in GiB, a quarter of it shared memory."""


class Toleration(Section):
    """A taint that the worker pods put up with, as Kubernetes spells it."""

    key: str = ""
    """The taint's key; empty, with operator Exists, means every taint."""
    operator: Literal["Equal", "Exists"] = "Exists"
    """Equal compares the value too."""
    value: str = ""
    """The taint's value, for Equal."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Empty means every effect."""

    @model_validator(mode="after")
    def _is_one(self) -> "Toleration":
        if self.operator == "Exists" and self.value:
            raise ValueError(
                f'value {self.value!r} is compared with operator = "Equal" alone: set it, or drop the value'
            )
        if self.operator == "Equal" and not self.key:
            raise ValueError('operator = "Equal" needs a key')
        return self


class RayJobCluster(Section):
    """A cluster of each job's own on Kubernetes: a RayJob that KubeRay starts, and Kueue lets in when there is room."""

    kind: Literal["rayjob"]
    """A cluster that KubeRay creates for the job and deletes after it."""
    has_address: ClassVar[bool] = False
    image: Annotated[str, StringConstraints(pattern=r"^\S+$")] = IMAGE
    """Image of every Ray pod, with a tag other than latest or a digest."""
    image_pull_secrets: list[DnsName] = []
    """Secrets with which the image is pulled."""
    namespace: OptionalName = ""
    """Namespace of the RayJob; empty means the namespace of the pod that submits it."""
    service_account: DnsName = "fineloop-trainer"
    """ServiceAccount of the Ray pods."""
    evaluation_service_account: Annotated[DnsName, Added("0.2.0")] = "fineloop-evaluator"
    """ServiceAccount of the Ray pods that only evaluate, where registry.trusted_keys are set."""
    queue: OptionalName = "fineloop"
    """Kueue's LocalQueue; empty runs without Kueue."""
    queue_timeout_s: Annotated[int, Field(ge=60)] = 86_400
    """Longest wait in the queue; after it the job is given up."""
    priority_class: OptionalName = ""
    """Kueue's WorkloadPriorityClass; empty means the queue's default."""
    pod_priority_class: Annotated[OptionalName, Added("0.2.0")] = ""
    """The pods' PriorityClass, by which the scheduler evicts others for them; empty means the cluster's default."""
    topology: Annotated[str, StringConstraints(pattern=rf"^(({_DOMAIN})?{_NAME})?$"), Added("0.2.0")] = ""
    """A level of the queue's Topology, such as a rack, by its nodes' label: Kueue places all workers within one."""
    topology_required: Annotated[bool, Added("0.2.0")] = False
    """Wait until one of them has room for all workers; otherwise workers are spread over as few as possible."""
    labels: Annotated[dict[LabelKey, LabelValue], Added("0.2.0")] = {}
    """Labels of the RayJob, its pods and the pipeline's steps, such as a cost centre."""
    ca_bundle: Annotated[OptionalName, Added("0.2.0")] = ""
    """A ConfigMap whose key ca.crt holds every certificate authority that Ray pods and steps trust, yours and the
    public ones: it takes the place of the images' own."""
    nodes: Annotated[int, Field(ge=0)] = 0
    """Number of worker pods, over which ray.num_workers is divided evenly; 0 means one pod for each worker."""
    worker: WorkerPod = WorkerPod()
    """Size of a worker pod; its GPUs, one for each of its workers, come on top."""
    head: HeadPod = HeadPod()
    """Size of the head, where no training runs."""
    data: Annotated[DataPods, Added("0.2.0")] = DataPods()
    shared_memory_gib: Annotated[int, Field(ge=1)] = 8
    """/dev/shm of a worker pod in GiB, for NCCL, data loading and Ray's object store; part of the pod's memory."""
    disk_gib: Annotated[int, Field(ge=1)] = 100
    """Limit in GiB on what a Ray pod writes to /tmp, and the same again to its home; beyond it, the pod is evicted. One
    of the two holds the base model, 2 GiB for each billion of parameters; /tmp also holds Ray's session and spilled
    objects."""
    gpu_resource: ResourceName = NVIDIA_GPU
    """Name of the GPU resource in Kubernetes."""
    node_selector: dict[str, str] = {}
    """Labels that the workers' nodes must have; absent means the nvidia.com/gpu.product that belongs to ray.gpu."""
    tolerations: list[Toleration] = []
    """Taints of nodes that workers tolerate, beside the GPU's own."""
    spot: bool = False
    """Allow workers on spot nodes. The head never runs there: the whole job would end with it."""
    env: dict[str, str] = {}
    """Environment variables of the Ray pods, such as NCCL_SOCKET_IFNAME. Secrets belong in Secret fineloop-s3."""
    ttl_s: Annotated[int, Field(ge=60)] = 600
    """How long the cluster of a failed job is kept, so that its dashboard can be read. After a success it is deleted at
    once."""
    backoff_limit: Annotated[int, Field(ge=0, le=10)] = 1
    """How often KubeRay creates a new cluster for a job that died without giving a reason: a lost head, no memory."""
    pre_running_timeout_s: Annotated[int, Field(ge=60)] = 1_800
    """Longest time for nodes, images and pods to become ready, once the job has left the queue and after a lost
    head."""

    @field_validator("image")
    @classmethod
    def _is_pinned(cls, image: str) -> str:
        name, _, digest = image.partition("@")
        tag = name.rpartition("/")[2].partition(":")[2]
        if not digest and tag in ("", "latest"):
            raise ValueError(f"{image!r} means another image tomorrow: give it a tag other than latest, or a digest")
        return image

    @field_validator("env")
    @classmethod
    def _holds_no_secret(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if _SECRET.search(name):
                raise ValueError(
                    f"{name} looks like a secret, and a config is no place for one: put it in Secret fineloop-s3"
                )
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a variable")
            if name in _OURS:
                raise ValueError(f"{name} is set by Fineloop: remove it")
        return env

    @field_validator("labels")
    @classmethod
    def _are_not_ours(cls, labels: dict[str, str]) -> dict[str, str]:
        for key in labels:
            if _TAKEN.search(key.rpartition("/")[0]):
                raise ValueError(f"label {key} belongs to the cluster or to Fineloop: choose a name of your own")
        return labels

    @model_validator(mode="after")
    def _fits(self) -> "RayJobCluster":
        if self.gpu_resource in self.worker.resources:
            raise ValueError(
                f"worker.resources has {self.gpu_resource}, which use_gpu and num_workers ask for: leave it out"
            )
        if self.topology_required and not self.topology:
            raise ValueError("topology_required needs topology, the label of a level: set it")
        if self.shared_memory_gib >= self.worker.memory_gib:
            raise ValueError(
                f"shared_memory_gib {self.shared_memory_gib} is a part of worker.memory_gib {self.worker.memory_gib} "
                "and leaves nothing of it: raise worker.memory_gib"
            )
        return self

    def pods(self, num_workers: int) -> int:
        """Number of worker pods for this many workers."""
        return self.nodes or num_workers

    def for_data(self) -> "RayJobCluster":
        """The cluster of the job that prepares the data, with a worker for each pod."""
        return self.model_copy(
            update={
                "nodes": self.data.pods,
                "worker": WorkerPod(cpu=self.data.cpu, memory_gib=self.data.memory_gib),
                "shared_memory_gib": self.data.memory_gib // 4,
                "node_selector": {},
                "tolerations": [],
                "topology": "",
                "topology_required": False,
            }
        )

    def require_room(self, *, num_workers: int, cpus_per_worker: int) -> None:
        """Refuse workers that its pods could not hold.

        Raises:
            ValueError: they cannot be shared out evenly, or a pod has too few CPUs.
        """
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

    def require_disk(self, base: str, needed: int) -> None:
        """Refuse a base that the disk of a pod does not hold; `needed` in bytes.

        Raises:
            ConfigError: it is more than `disk_gib`.
        """
        if needed > self.disk_gib * GIB:
            raise ConfigError(
                f"each pod downloads {base} and writes {needed / GIB:.0f} GiB to its disk, and ray.cluster.disk_gib is "
                f"{self.disk_gib}, beyond which it is evicted: set ray.cluster.disk_gib={-(-needed * 5 // (4 * GIB))}"
            )


Cluster = Annotated[JobsApiCluster | RayJobCluster, Field(discriminator="kind")]
"""Each says whether RAY_ADDRESS names it, how long a job may wait in its queue, and which workers it cannot hold."""


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
    max_preemption_failures: Annotated[int, Field(ge=-1), Added("0.2.0")] = -1
    """How often workers are restarted because their node was preempted, as spot nodes are; -1 is unlimited. They save a
    checkpoint as soon as the preemption is announced, and lose no step."""
    collective_timeout_s: Annotated[int, Field(ge=60), Added("0.2.0")] = 1_800
    """Timeout of collective operations, after which workers that cannot reach each other fail."""
    timeout_s: Annotated[int, Field(ge=60)] = 86_400
    """Deadline of a run's Ray job (training and evaluation), from when it may start; past it, the job is stopped."""
    cluster: Cluster = JobsApiCluster()
    """Which cluster: kind jobs-api is an existing one, rayjob creates one for each job on Kubernetes."""

    @model_validator(mode="after")
    def _image_knows_the_gpu(self) -> "RayConfig":
        if self.gpu == "V100" and self.cluster.image == IMAGE:
            raise ValueError(
                f"gpu V100: PyTorch in cluster.image {IMAGE} is built for CUDA 13, which has no kernels for it: take "
                "gpu=T4 or a newer one, or an image with PyTorch for CUDA 12"
            )
        return self

    @model_validator(mode="after")
    def _cluster_holds_the_workers(self) -> "RayConfig":
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers {self.num_workers} is [min, max]: put the smaller number first")
        self.cluster.require_room(num_workers=self.max_workers, cpus_per_worker=self.cpus_per_worker)
        return self

    def for_data(self, *, timeout_s: int) -> "RayConfig":
        """Settings of the job that prepares the data: no GPU, and its own deadline."""
        cluster = self.cluster.for_data()
        pods = cluster.nodes if isinstance(cluster, RayJobCluster) else self.num_workers
        changes = {"cluster": cluster, "num_workers": pods, "use_gpu": False, "gpu": None, "timeout_s": timeout_s}
        return self.model_copy(update=changes)

    def for_evaluation(self) -> "RayConfig":
        """Settings of a job that only evaluates: its pods have an account of their own."""
        if not isinstance(self.cluster, RayJobCluster):
            return self
        account = {"service_account": self.cluster.evaluation_service_account}
        return self.model_copy(update={"cluster": self.cluster.model_copy(update=account)})

    @property
    def min_workers(self) -> int:
        """The fewest that train, and so those of which each has the most to hold."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while they train."""
        return self.min_workers < self.max_workers

    @property
    def per_worker(self) -> dict[str, float]:
        """What Ray sets aside for each worker, by its names of resources."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1} if self.use_gpu else {})}

    @property
    def patience_s(self) -> int:
        """The longest that a step waits for one job, queue included: what its own timeout must exceed."""
        return self.timeout_s + self.cluster.queue_timeout_s


# What an hour of a GPU costs.


def price_per_hour(ray: RayConfig, gpu: str) -> tuple[float, str] | None:
    """US dollars and where they are from: the config's price, or the list's for the product that a worker names."""
    if not gpu:
        return None
    if ray.gpu_price_per_hour is not None:
        return ray.gpu_price_per_hour, "ray.gpu_price_per_hour"
    listed = next((each for each in GPUS.values() if each.product.replace("-", " ") == gpu), None)
    listed = listed or (GPUS[ray.gpu] if ray.gpu else None)
    return (listed.price_per_hour, f"{listed.price_source}, {PRICED}") if listed else None
