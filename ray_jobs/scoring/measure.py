"""Measuring base, champion and candidate on the same records: their files, the tokenized records, and their scores."""

import gc
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from components.config.gate import GateConfig
from components.config.methods import BaseFormat
from components.config.schema import ModelConfig, RunConfig
from components.handover.serve_manifest import max_lora_rank
from components.prepare.dataset import Record
from components.records.steps import Evaluation, Role
from components.registry.versions import Version, evaluation, pull_version
from components.shared.errors import ConfigError, DataError, IntegrityError
from components.shared.paired import Pairs, bounds, records_to_decide
from components.shared.protocol import say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import build, own_base, recorded
from ray_jobs.base import architecture, base_model
from ray_jobs.base.base_model import Base
from ray_jobs.kernels import door
from ray_jobs.kernels.door import PLAIN, Kernels
from ray_jobs.scoring import STEP, answers, vllm_engine
from ray_jobs.scoring.answers import LEAST_NEW_TOKENS, USUAL_NEW_TOKENS, Score, pairs_of
from ray_jobs.scoring.vllm_engine import Request
from ray_jobs.text import chat_format
from ray_jobs.text.batching import TokenizedSplit, tokenize
from ray_jobs.text.chat_format import ChatFormat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

T = TypeVar("T")
logger = logging.getLogger(__name__)

# The protocol of probes, which measure something other than the held-out records; an evaluation knows only it.

Findings = dict[Role, Any]
"""Results of a probe's share, for each model that it had to measure."""
Rows = Callable[[int], Sequence[int]]
"""A function from a number of items to the indices of those that a worker measures."""


@dataclass(frozen=True)
class Subject:
    """A model to measure, with its adapter on it and in evaluation mode."""

    role: Role
    model: Any
    chat: ChatFormat
    batch_size: int


@dataclass(frozen=True)
class Outcome:
    """The result of a probe."""

    record: Any
    """The probe's part of the evaluation record."""
    metrics: Mapping[Role, Mapping[str, float | None]] = field(default_factory=dict)
    """Metrics that the probe adds to each model, by the keys of METRICS."""
    lines: Sequence[str] = ()
    """Lines for the log."""


class Probe(Protocol):
    """Items to measure, and the models that no earlier run has measured on them. Probes are pickled for the workers."""

    def at(self, rows: Rows) -> "Probe":
        """A worker's share: the items at `rows(count)`."""

    def held_together(self) -> "Probe":
        """The probe for workers that shard the base, where every forward pass is a collective operation."""

    def run(self, subject: Subject, findings: Findings) -> Any | None:
        """Measure a model on this share; None if its result is known already. `findings` holds the results of the
        models measured before, the base first."""

    def outcome(self, shares: Sequence[Findings], chat: ChatFormat) -> Outcome:
        """The outcome over all shares, among which the items were dealt in turn, and over what was known before."""


Probes = Mapping[str, Probe]
"""Probes by their keys in evaluation.json."""
NO_PROBES: Probes = {}


def run_all(probes: Probes, subject: Subject, findings: Mapping[str, Findings]) -> None:
    """Measure a model with each probe, and add the results to `findings`."""
    for key, probe in probes.items():
        if (finding := probe.run(subject, findings[key])) is not None:
            findings[key][subject.role] = finding


class BaseCache:
    """One frozen base per process, for successive trainings and measurements: reading and quantising it takes longer
    than many trials' training, or scoring many records."""

    def __init__(self) -> None:
        self.num_loaded = 0
        self.start_loss: float | None = None
        """Validation loss per answer token of the loaded base, without an adapter; None until it is measured."""
        self.general_nll: list[float] | None = None
        """Negative log-likelihood of the loaded base on each passage of general text; None until it is measured."""
        self.free_since: float | None = None
        """Time at which its last use ended, on the monotonic clock."""
        self.kernels: Kernels | None = None
        """The kernels of its matrix products."""
        self._key: tuple[Any, ...] = ()
        self._model: PreTrainedModel | None = None
        self._wide: dict[str, torch.Tensor] = {}

    def load(
        self, base: Base, config: ModelConfig, base_format: BaseFormat, kernels: Kernels, **how: Any
    ) -> "PreTrainedModel":
        """Load the base as `door.load_model` does, or return the loaded one for the same arguments, without what a
        training has added to it; its previous use must have ended. Another base is released first."""
        key = (base.identity, config.attention, config.trust_remote_code, base_format, kernels, how)
        if self._model is None or key != self._key:
            self.release()
            self._model = door.load_model(base, config, base_format, kernels, **how)
            # What transformers keeps in float32, such as routers, and DeepSpeed would cast to 16 bits.
            named = self._model.named_parameters()
            self._wide = {name: weight.data for name, weight in named if weight.dtype.itemsize > 2}
            self._key, self.kernels = key, kernels
            self.num_loaded += 1
        else:
            self.strip()
        return self._model

    def release(self) -> None:
        """Hold no base, and give back its memory."""
        self._model = self.start_loss = self.general_nll = None
        self._wide = {}
        door.give_back()  # reference cycles too: an adapted model and its engine, 4-bit weights and their layers

    def strip(self) -> None:
        """Restore the model to its state when loaded, except that weights that were made dense stay dense."""
        if self._model is not None and strip(self._model):
            for name, weight in self._wide.items():
                self._model.get_parameter(name).data = weight
            gc.collect()


def strip(model: "PreTrainedModel") -> bool:
    """Remove what peft and a training have added to a base; returns whether there were any adapter layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name in wrapped:
        if not any(name.startswith(f"{outer}.") for outer in wrapped):  # a wrapper may wrap another
            model.set_submodule(name, model.get_submodule(name).get_base_layer())
    for note in ("peft_config", "_hf_peft_config_loaded"):
        if note in vars(model):
            delattr(model, note)
    door.part(model)
    model.disable_input_require_grads()
    if model.is_activation_checkpointing:
        model.activation_checkpointing_disable()
    model.requires_grad_(False)
    return bool(wrapped)


@dataclass(frozen=True)
class Contender:
    """A model to measure: the base alone, or an adapter on the base that it was trained on."""

    role: Role
    config: RunConfig
    """The run's config, with the base and the method that this model was trained with."""
    version: Version | None
    """The adapter's version; None for the base alone."""
    base_identity: Mapping[str, str]
    """Identity of the base that the adapter was trained on; for the base alone, of the candidate's base."""
    stands_on_sha256: str = ""
    """sha256 of the manifest of the adapter's own base, as `Recorded` has it."""
    published_sha256: str = ""
    """sha256 of the manifest that this run's own training published; a trusted key signs it once the gate lets it pass.
    """
    alike: frozenset[str] = frozenset()
    """Labels that only their writing tells apart in the records that it is measured on."""


def of_version(role: Role, config: RunConfig, store: Store, version: Version) -> Contender:
    """The contender for a version, with the base and the method of its own run; raises as `recorded.read` does."""
    theirs = recorded.read(config, store, version)
    if why := theirs.config.without_vllm:
        raise ConfigError(f"{role} {version.version}: {why}")
    return Contender(role, theirs.config, version, theirs.base_identity, theirs.stands_on_sha256)


# What earlier runs measured of this run's contenders is not measured again. A contender on another base than the first
# one is left out: its tokens differ, and it never had the abilities and the knowledge of that base.


def on_the_first_base(contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders that share the first one's base."""
    return [contender for contender in contenders if contender.base_identity == contenders[0].base_identity]


def earlier_evaluations(store: Store, contenders: Sequence[Contender]) -> Iterator[tuple[Role, Evaluation, bool]]:
    """Yield each such contender's role, the evaluation of the run that trained it (as candidate), and whether that
    run's base is the same as this one's. Contenders without a complete evaluation are left out."""
    for contender in on_the_first_base(contenders):
        try:
            before = evaluation(store, contender.version) if contender.version else None
        except IntegrityError as exc:
            logger.info("%s: what it found is measured again", exc)
            continue
        if before is not None:
            yield contender.role, before, before.base.get("identity") == contenders[0].base_identity


def earlier_measurements(
    store: Store,
    config: RunConfig,
    contenders: Sequence[Contender],
    measurements_of: Callable[[Evaluation], tuple[str, Mapping[Any, T]] | None],
) -> dict[Role, T]:
    """Earlier runs' measurements, by the roles of this run. `measurements_of` returns the format of an earlier run's
    base and its measurements by that run's roles, or None if the run did not measure this."""
    result: dict[Role, T] = {}
    for role, before, same_base in earlier_evaluations(store, contenders):
        base_format, by_role = measurements_of(before) or ("", {})
        if "candidate" in by_role:
            result[role] = by_role["candidate"]
        if "base" in by_role and same_base and base_format == config.method.row.base:
            result["base"] = by_role["base"]
    return result


@dataclass(frozen=True)
class ShardResult:
    """Scores of the records that fit every contender's context, in order."""

    tokens: dict[str, int]
    """Number of answer tokens by record id, in the candidate's tokenizer: the divisor of every contender's loss."""
    scores: dict[Role, list[Score]]
    shares: list[dict[str, Findings]]
    """The probes' findings by the probes' keys: one for each worker, in the order in which items were dealt out."""
    first_scored_at: str = field(compare=False)
    """Time at which the first batch was scored, ISO 8601 in UTC."""
    matmul_dtype: str

    def order(self, records: Sequence[Record]) -> list[Record]:
        """Those of the records that were measured, in the order of their scores."""
        of_id = {record.id: record for record in records}
        return [of_id[name] for name in self.tokens]


def merged(results: Sequence[ShardResult]) -> ShardResult:
    """The results of several workers, one after the other."""
    return ShardResult(
        {name: count for result in results for name, count in result.tokens.items()},
        {role: [score for result in results for score in result.scores[role]] for role in results[0].scores},
        [share for result in results for share in result.shares],
        min(result.first_scored_at for result in results),
        results[0].matmul_dtype,
    )


@dataclass(frozen=True)
class LocalContender:
    """One contender with its files on this machine, and the records as its tokens."""

    role: Role
    config: RunConfig
    base: Base
    """Its base; for an adapter the one that it was trained on."""
    adapter: Path | None
    """Folder of the adapter; None for the base alone."""
    chat: ChatFormat
    split: TokenizedSplit
    alike: frozenset[str] = frozenset()

    @property
    def dtype(self) -> "torch.dtype":
        return architecture.dtype_here(self.config.train.dtype, use_gpu=self.config.ray.use_gpu)

    def load_base(self, kernels: Kernels, *, load: Callable[..., Any] = door.load_model) -> Any:
        how = {"use_gpu": self.config.ray.use_gpu, "dtype": self.dtype}
        return load(self.base, self.config.model, self.config.method.row.base, kernels, **how)

    def scores(self, model: Any, records: Sequence[Record], rows: Sequence[int], progress: "Progress") -> list[Score]:
        """Score the records at `rows` with `model`, which has this contender's adapter on it, if there is one."""
        from ray_jobs.scoring.generation import other_prompts, score

        others = other_prompts(self.split, self.config.model.max_length) if self.adapter else None
        return score(
            model.eval(),
            self.chat,
            [records[row] for row in rows],
            *(part.take(rows) for part in (self.split, others) if part is not None),
            marks=answers.named(self.config.metrics, self.alike),
            batch_size=self.config.evaluate.batch_size,
            max_new_tokens=self.config.evaluate.max_new_tokens or USUAL_NEW_TOKENS,
            advance=progress.advance,
        )

    @property
    def vllm_request(self) -> Request:
        """What vLLM is asked in place of this machine's model."""
        config, base, split = self.config, self.base.path, self.split
        most = config.evaluate.max_new_tokens or USUAL_NEW_TOKENS
        longest = config.model.max_length + most
        engine = {
            "model": str(base),
            "trust_remote_code": config.model.trust_remote_code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": "bitsandbytes" if config.method.row.base == "nf4" else None,
            "max_model_len": min(longest, base_model.positions(base_model.load_config(base, config.model)) or longest),
            "max_num_seqs": config.evaluate.batch_size,
            "max_lora_rank": max_lora_rank(config.method.r),
        }
        prompts = [split.prompt(row).tolist() for row in range(len(split))]
        return json.dumps(engine), [str(self.adapter or ""), prompts, most, sorted(self.chat.stops)]

    @property
    def answer_tokens(self) -> dict[str, int]:
        return dict(zip(self.split.ids, self.split.num_answer_tokens.tolist(), strict=True))

    def subject(self, model: Any) -> Subject:
        return Subject(self.role, model.eval(), self.chat, self.config.evaluate.batch_size)


@contextmanager
def local_contenders(
    contenders: Sequence[Contender], records: Sequence[Record]
) -> Iterator[tuple[list[Record], list[LocalContender]]]:
    """Yield the records that fit every contender's context, and the contenders; their adapters are deleted afterwards.
    Raises DataError: no record fits."""
    with tempfile.TemporaryDirectory(prefix="fineloop-adapters-") as scratch:
        local = [_local(contender, records, Path(scratch) / contender.role) for contender in contenders]
        fitting = set.intersection(*(set(contender.split.ids) for contender in local))
        kept = [record for record in records if record.id in fitting]
        if not kept:
            limit = contenders[-1].config.model.max_length
            raise DataError(f"no held-out record fits model.max_length {limit}: raise it")
        rows_of = {
            contender.role: [row for row, name in enumerate(contender.split.ids) if name in fitting]
            for contender in local
        }
        yield kept, [replace(contender, split=contender.split.take(rows_of[contender.role])) for contender in local]


def measure_shard(
    contenders: Sequence[Contender],
    records: Sequence[Record],
    probes: Probes = NO_PROBES,
    *,
    shard_index: int,
    kernels: Kernels = PLAIN,
    cache: BaseCache | None = None,
) -> ShardResult:
    """Measure every contender on some records and with some probes, one after the other.

    `cache` has a base that this process already holds: contenders on it need not load it.
    """
    import torch

    entry.quiet_libraries()
    candidate = contenders[-1].config
    if not candidate.ray.use_gpu:
        torch.set_num_threads(candidate.ray.cpus_per_worker)
    with local_contenders(contenders, records) as (kept, local):
        progress = Progress(2 * len(kept) * len(contenders), prints=shard_index == 0)
        cache, seen = cache or BaseCache(), 0
        if candidate.evaluate.engine == "vllm":
            cache.release()  # vLLM needs the memory
            generated = vllm_engine.answers([contender.vllm_request for contender in local])
            for place, (contender, tokens) in enumerate(zip(local, generated, strict=True)):
                texts = [contender.chat.text_of(answer) for answer in tokens]
                local[place] = replace(contender, split=replace(contender.split, by_vllm=texts))
        scores: dict[Role, list[Score]] = {}
        findings: dict[str, Findings] = {key: {} for key in probes}
        for contender in local:
            base = contender.load_base(kernels, load=cache.load)
            if cache.num_loaded != seen:
                kernels.hold_dense_if_room(base, sharers=candidate.ray.max_workers)
                seen = cache.num_loaded
            progress.role = contender.role
            model = kernels.adopt(build.load(base, contender.adapter)) if contender.adapter else base
            try:
                scores[contender.role] = contender.scores(model, kept, range(len(kept)), progress)
                run_all(probes, contender.subject(model), findings)
            finally:
                if contender.adapter:
                    model.unload()  # removes the adapter from the base
            del base, model  # another base may need the memory
        return ShardResult(local[-1].answer_tokens, scores, [findings], progress.first_scored_at, kernels.dtype)


def _local(contender: Contender, records: Sequence[Record], folder: Path) -> LocalContender:
    config, store, adapter = contender.config, Store.open(contender.config.registry), None
    original = base = base_model.resolve(config.model, recorded=contender.base_identity, registry=store)
    if contender.version is None:
        chat = chat_format.load(original, config.model)
    else:
        adapter = folder
        base = own_base.find(config, original, store, sha256=contender.stands_on_sha256)
        pull_version(store, contender.version, folder, published_sha256=contender.published_sha256)
        chat = chat_format.of_version(contender.version, folder, original, config.model)
    # Tokens that lie beside the dataset are not read: whoever wrote them would decide what the gate measures.
    split = tokenize(records, chat, config.model.max_length)
    return LocalContender(contender.role, config, base, adapter, chat, split, contender.alike)


def with_room_for_answers(config: RunConfig, records: Sequence[Record], chat: ChatFormat) -> RunConfig:
    """The config with `evaluate.max_new_tokens`: where none is set, enough for every reference answer, and no more."""
    if config.evaluate.max_new_tokens is not None:
        return config
    split = tokenize(records, chat, config.model.max_length)
    longest = int(split.num_answer_tokens.max(initial=LEAST_NEW_TOKENS))
    if longest > USUAL_NEW_TOKENS:
        say(STEP, f"answers may be {longest} tokens long, as the longest reference is (evaluate.max_new_tokens)")
    settled = config.evaluate.model_copy(update={"max_new_tokens": longest})
    return config.model_copy(update={"evaluate": settled})


class Progress:
    """Progress of a worker's measurements; only one worker prints it."""

    def __init__(self, total: int, *, prints: bool) -> None:
        self.role = self.first_scored_at = ""
        self._prints, self._total = prints, total
        self._done, self._said_at = 0, 0.0

    def advance(self, count: int) -> None:
        self._done += count
        self.first_scored_at = self.first_scored_at or datetime.now(UTC).isoformat(timespec="microseconds")
        now = time.monotonic()
        if self._prints and now - self._said_at >= 2.0:
            self._said_at = now
            say(STEP, f"{self.role}: {self._done / self._total:.0%} of all answers")


# The results on held-out records, and how many more records a decision needs; pure functions.

CLEAR = 0.999
"""Confidence at which an interim result needs no more records: a single look at such a high level hardly changes the
error rate (the Haybittle-Peto boundary, British Journal of Cancer 34, 1976)."""
FURTHER_POWER = 0.95
"""Power that further records are drawn for: they cost minutes, a night that cannot tell its whole training."""


def records_wanted(policy: GateConfig, compared: Mapping[Role, Pairs]) -> int:
    """Number of records at which a candidate as good as champion and anchor (the best version) passes the gate with
    `FURTHER_POWER`; 0 where the records at hand decide.

    It depends on how much the models differ from record to record, not on which is ahead, so that looking before
    drawing more favours no verdict (Wittes and Brittain, Statistics in Medicine 9, 1990: an internal pilot).
    """
    margins: dict[Role, float] = {"champion": policy.worse_than_champion_by, "anchor": policy.total_budget}
    wanted = 0
    for role, margin in margins.items():
        pairs = compared.get(role)
        estimate = bounds(pairs, CLEAR) if pairs and margin else None
        if estimate is None or estimate.upper < -margin:
            continue
        if role == "champion" and pairs is not None and not pairs.are_binary:
            least = policy.records_to_replace(float(pairs.theirs.sum() / pairs.weights.sum()))
            lacking = least / pairs.num_effective
            wanted = max(wanted, math.ceil(estimate.records * lacking) if lacking > 1 else 0)
        if estimate.lower >= -margin:
            continue
        equal = replace(estimate, gain=0.0)
        wanted = max(wanted, records_to_decide(equal, -margin, policy.confidence, FURTHER_POWER) or 0)
    return wanted


def further(
    config: RunConfig, records: Sequence[Record], left: Sequence[Record], measured: "ShardResult"
) -> Sequence[Record]:
    """Those `left` to measure as well: as many as a decision needs, up to `evaluate.max_records` in all."""
    if not left:
        return ()
    policy, groups = config.gate, [record.group for record in measured.order(records)]
    ours, relative = measured.scores["candidate"], policy.margins == "relative"
    compared = {
        role: pairs_of(ours, theirs, [*measured.tokens.values()], policy.metric, groups, relative=relative)
        for role, theirs in measured.scores.items()
        if role not in ("candidate", "base")
    }
    wanted = min(records_wanted(policy, compared), config.evaluate.max_records) - len(measured.tokens)
    # A single record is not enough: its answer is also scored behind another record's prompt.
    return left[:wanted] if min(wanted, len(left)) > 1 else ()
