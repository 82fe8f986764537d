"""What a training starts from: the base alone or an earlier version on it, and the records of a prepared dataset."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from components.config.config_file import COMMIT
from components.config.methods import AXES
from components.config.schema import RunConfig
from components.prepare.dataset import read_split
from components.prepare.split import is_validation
from components.records import runs
from components.registry import lineage
from components.registry.aliases import read_alias
from components.registry.versions import Version, read_lineage, resolve
from components.shared.errors import ConfigError, DataError, IntegrityError
from components.shared.protocol import counted
from components.store import folders
from components.store.store import JSON, Store, decode_json, encode_json
from ray_jobs.adapters import recorded
from ray_jobs.base import base_model
from ray_jobs.text import chat_format, token_store
from ray_jobs.text.chat_format import ChatFormat
from ray_jobs.text.token_store import Ids, Rows, StoredTokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Log = Callable[[str], None]


class ResolvedBase(NamedTuple):
    """What the driver of a job has of a base, without its weights."""

    config: RunConfig
    """With the context that the base has positions for."""
    base: base_model.Base
    shape: "PretrainedConfig"
    chat: ChatFormat


def resolve_base(
    config: RunConfig, store: Store, log: Log, *, recorded: Mapping[str, str] | None = None
) -> ResolvedBase:
    """The base that `model.base` names, or only the one that is `recorded`; raises as `base_model.resolve` and
    `base_model.fitted` do."""
    base = base_model.resolve(config.model, recorded=recorded, weights=False, registry=store)
    shape = base_model.load_config(base.path, config.model)
    config = base_model.fitted(config, shape, log)
    return ResolvedBase(config, base, shape, chat_format.load(base, config.model))


def identity_to_keep(config: RunConfig, store: Store, run_id: str, log: Log) -> Mapping[str, str] | None:
    """Identity that a run's base must have: of the checkpoint that an earlier attempt left, else of a hub's base the
    commit that production has, or the version that it starts from, so that a branch that moves ends no run. None where
    what `model.base` names today will do."""
    if next(store.folders(runs.run_key(run_id, runs.CHECKPOINTS)), None):
        from ray_jobs.training import checkpoint  # imports DeepSpeed

        progress = checkpoint.newest(store, run_id)
        if progress and progress.base:
            return progress.base
    reference = _begins_from(config, store)
    if not reference or COMMIT.fullmatch(config.model.revision):
        return None
    made = read_lineage(store, resolve(store, reference))
    model = made.get("config", {}).get("model", {})
    commit = str(made.get("base", {}).get("identity", {}).get("commit", ""))
    theirs = str(model.get("revision", ""))
    # Another branch or tag than theirs asks for what that names today.
    is_meant = config.model.revision in ("", theirs) or COMMIT.fullmatch(theirs)
    if not commit or not is_meant or model.get("base") != config.model.base:
        return None
    log(
        f"{config.model.base} stays at commit {commit}, which {reference} was trained on: for another one set "
        "model.revision to it, and train.start_from=base"
    )
    return {"kind": "hub", "commit": commit}


def _begins_from(config: RunConfig, store: Store) -> str:
    """The version that `train.start_from` names; for the base alone that in production. Empty where none is."""
    reference = config.train.start_from
    if reference not in ("base", "production"):
        return reference
    pointer = read_alias(store, config.adapter.name, config.adapter.alias)
    return f"{config.adapter.name}@{pointer.version}" if pointer else ""


class Start(NamedTuple):
    """The version that a training starts from."""

    version: Version
    base: base_model.Base
    """The run's base, with the identity that it must have in a training from here."""
    stands_on_sha256: str
    """The manifest's sha256 of a base of the version's own; empty without one."""


def choose_start(config: RunConfig, store: Store, run_id: str, base: base_model.Base) -> Start | None:
    """The version that `train.start_from` names; None for the base alone, as where nothing is in production yet.

    Raises:
        ConfigError: the version was trained with another method, rank or layers.
        UserError: the reference is malformed, or fits several versions.
        ObjectMissing: there is no such version.
        IntegrityError: it stands on another base, or its lineage is damaged.
    """
    if config.train.start_from == "base":
        return None
    reference = _begins_from(config, store)
    version = resolve(store, reference) if reference else None
    first = encode_json({"version": f"{version.name}@{version.version}" if version else ""})
    key = runs.run_key(run_id, runs.START)  # the first attempt decides for all later ones, even if the alias has moved
    chosen = decode_json(store.claim(key, first, content_type=JSON), store.uri(key))["version"]
    if not chosen:
        return None
    version = resolve(store, chosen)
    theirs = recorded.read(config, store, version)
    if not base_model.is_same(base, theirs.base_identity):
        was, now = (base_model.text_of(identity) for identity in (theirs.base_identity, base.identity))
        raise IntegrityError(
            f"train.start_from = {config.train.start_from!r}: {version.name} {version.version} was trained on "
            f"{theirs.config.model.base} with {was}, and model.base is {base.reference} with {now}: name the one that "
            "it was trained on in model.base, and its commit in model.revision, or begin on the other one with "
            "train.start_from=base"
        )
    if not base.is_known:  # the workers compare it, when they read it
        base = replace(base, identity=dict(theirs.base_identity))
    other = _shape(theirs.config)
    for field, value in _shape(config).items():
        if other[field] != value:
            raise ConfigError(
                f"train.start_from = {config.train.start_from!r}: {version.name} {version.version} was trained with "
                f"method.{field} = {other[field]!r}, and this run has {value!r}: set it so, or start from the base"
            )
    return Start(version, base, theirs.stands_on_sha256)


def flops_of(store: Store, version: Version | None) -> float | None:
    """FLOPs of the version's training and of all trainings that it builds on; None where one of them is unknown, 0
    without a version."""
    if version is None:
        return 0.0
    more = read_lineage(store, version).get("training", {}).get("more", {})
    flops = (more.get("usage") or {}).get("flops_with_parents")
    return None if flops is None else float(flops)


def _shape(config: RunConfig) -> dict[str, Any]:
    """The settings of the method that a version's weights depend on, by the config's names."""
    method = config.method
    row = {axis: getattr(method.row, axis) for axis in AXES}
    return {**row, "rank": method.r, "alpha": method.lora_alpha, "target_modules": method.target_modules}


# The splits of a prepared dataset that a training uses: training records and validation records.


@dataclass(frozen=True)
class PlannedSplit:
    """A split as the driver sees it: the lengths of its rows, and a reference to their tokens for the workers."""

    stored: StoredTokens
    lengths: npt.NDArray[np.int64]
    """Number of tokens of each row."""
    num_answer_tokens: npt.NDArray[np.int64]
    """Number of labelled tokens of each row."""

    def __len__(self) -> int:
        return len(self.lengths)


def read_splits(store: Store, dataset_uri: str, resolved: ResolvedBase, log: Log) -> tuple[PlannedSplit, PlannedSplit]:
    """The training records, and the validation records by which checkpoints and a sweep's trainings are chosen, as
    tokens. They are tokenised unless an earlier training has done so. Raises DataError: too many records are too long
    for `model.max_length`; ConfigError: the base has no embedding for a token."""
    config, _, shape, chat = resolved
    how: dict[str, Any] = {"max_length": config.model.max_length, "loss_on": config.data.loss_on}
    train = token_store.ensure(store, dataset_uri, "train", chat, **how)
    rows, ids = token_store.load_rows(store, train)
    _check_lengths(rows, ids, config, log)
    train_split = _planned_split(train, rows, token_store.is_kept(rows))
    held_out = token_store.ensure(store, dataset_uri, "eval", chat, **how)
    rows, ids = token_store.load_rows(store, held_out)
    # Validation records, by which weights are chosen; all held-out ones where there would otherwise be none.
    share = config.data.validation_share
    records = chain.from_iterable(read_split(store, dataset_uri, "eval"))
    flags = np.array([is_validation(record, share) for record in records], dtype=np.bool_)
    chosen = (flags if flags.any() and not flags.all() else np.ones_like(flags))[rows["record"]]
    _check_lengths(rows[chosen], ids.take(np.flatnonzero(chosen)), config, log)
    places = np.flatnonzero(token_store.is_kept(rows) & chosen)[: config.train.eval_records]
    kept = np.cumsum(token_store.is_kept(rows)) - 1
    eval_split = _planned_split(replace(held_out, rows=kept[places]), rows, places)
    num_embeddings = shape.get_text_config().vocab_size
    if len(chat.tokenizer) > num_embeddings:
        stored = (token_store.load(store, split.stored) for split in (train_split, eval_split))
        largest = max(chat.pad, *(int(split.tokens.max()) for split in stored))
        if largest >= num_embeddings:
            raise ConfigError(
                f"the tokenizer of model.base {config.model.base} writes token {largest} "
                f"({chat.tokenizer.convert_ids_to_tokens(largest)!r}), and the base has embeddings for "
                f"{num_embeddings}: resize them (resize_token_embeddings) and save the base again, or take those "
                "tokens out of its tokenizer"
            )
    return train_split, eval_split


def _planned_split(stored: StoredTokens, rows: Rows, places: npt.NDArray[Any]) -> PlannedSplit:
    return PlannedSplit(stored, rows["length"][places].astype(np.int64), rows["answers"][places].astype(np.int64))


def _check_lengths(rows: Rows, ids: Ids, config: RunConfig, log: Log) -> None:
    """Require that not too many records are left out or shortened; `log` receives a line about those that are. Raises
    DataError: there are more of them than `data.max_reject_share` allows."""
    limit, allowed = config.model.max_length, config.data.max_reject_share
    kept, num_records = token_store.is_kept(rows), len(np.unique(rows["record"]))
    too_long = ids.take(token_store.first_of_each_record(rows, ~kept))
    cut = ids.take(token_store.first_of_each_record(rows, kept & (rows["cut"] > 0)))

    def share(ids: Ids) -> str:
        return f"{len(ids)} of {num_records} records ({len(ids) / num_records:.0%}; as {ids[0]!r})"

    if len(too_long) > allowed * num_records or not kept.any():
        raise DataError(
            f"the answers of {share(too_long)} are too long for model.max_length {limit}, and none is ever cut, or "
            "hold a token that ends an answer: raise it, change the answers, or allow their loss with "
            f"data.max_reject_share (now {allowed:g})"
        )
    if len(cut) > allowed * num_records:
        raise DataError(
            f"the prompts of {share(cut)} are too long for model.max_length {limit} and would be "
            "shortened: raise it, shorten them yourself, or allow that with data.max_reject_share (now "
            f"{allowed:g})"
        )
    if too_long:
        why = f"their answers do not fit model.max_length {limit}, or hold a token that ends an answer"
        log(f"left out {counted(len(too_long), 'record')}: {why}")
    if cut:
        of_system = len(token_store.first_of_each_record(rows, kept & (rows["cut"] > 1)))
        too = f", {of_system:,} of them in the system message too" if of_system else ""
        log(f"made {counted(len(cut), 'prompt')} shorter, to fit model.max_length {limit}{too}")


def dataset_record(store: Store, uri: str, *read: StoredTokens) -> lineage.Dataset:
    """The dataset as the lineage records it, with the tokens that were `read`."""
    manifest = folders.read_manifest(store, store.key(uri).rstrip("/"))
    about = manifest.about
    tokens = {stored.key.rpartition("/")[2]: stored.content_sha256 for stored in read}
    counts = about["train_records"], about["eval_records"]
    return lineage.Dataset(about["dataset_id"], uri, manifest.sha256, *counts, tokens)
