"""On-policy replay (arXiv:2605.29495): the production version answers earlier prompts, and its correct answers are
trained on in place of the records' own.

Training on a model's own words keeps the new model closer to it than training on another's words. Where production
answers wrongly, the record's own answer stays: wrong answers would be learnt, and without these records only what is
easy would be replayed (docs/data.md has figures). The answers form a new dataset, so that a version's lineage names
what it was trained on.
"""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

from components.config.schema import RunConfig
from components.prepare import dataset
from components.prepare.dataset import REJECTS, Record, SplitName, batch_of, load_split, present, read_split
from components.records import runs
from components.records.runs import Replayed
from components.registry.aliases import read_alias
from components.registry.between_runs import require_none_erased
from components.registry.identity import TOKENS
from components.registry.versions import resolve
from components.shared.errors import ObjectMissing
from components.shared.metrics import alike
from components.shared.protocol import counted
from components.store import folders
from components.store.store import JSON, Store, encode_json
from ray_jobs.base import attention
from ray_jobs.scoring.measure import of_version, with_room_for_answers
from ray_jobs.text.chat_format import without_reasoning

Log = Callable[[str], None]
RIGHT = 0.5
"""Smallest value of data.replay_metric at which an answer of production is used."""
FORMAT = 3
"""Version number of the stored answers: increment it when the way that they are made changes."""


def training_data(config: RunConfig, store: Store, dataset_uri: str, log: Log, *, run_id: str) -> str:
    """URI of the dataset to train on: the prepared one, or, where that has replay records, a new one with production's
    answers to them. A resumed run uses the same dataset as before. Raises UserError: this image or the data cannot be
    trained with, or the version in production cannot be run; JobError: the workers failed."""
    attention.require_installed(config.model.attention, use_gpu=config.ray.use_gpu)
    store.check()
    require_none_erased(store, dataset_uri)
    prepared = folders.read_manifest(store, store.key(dataset_uri).rstrip("/"))
    if not prepared.about.get("replay_records"):
        return dataset_uri
    before = runs.find(store, run_id, Replayed)
    if before is None or before.prepared_uri != dataset_uri:
        before = _replayed(config, store, dataset_uri, run_id, log)
        runs.write(store, run_id, before)
    return before.dataset_uri


def _replayed(config: RunConfig, store: Store, dataset_uri: str, run_id: str, log: Log) -> Replayed:
    pointer = read_alias(store, config.adapter.name, config.adapter.alias)
    version = pointer.version if pointer else None
    # Inside the prepared dataset's folder, so that the answers are deleted with it.
    how = [FORMAT, version, config.data.replay_metric, RIGHT, config.evaluate.max_new_tokens]
    digest = hashlib.sha256(encode_json(how)).hexdigest()[:16]
    key = f"{store.key(dataset_uri).rstrip('/')}/{TOKENS}/replayed-{digest}.json"
    if (stored := store.read(key)) is not None:
        replayed = Replayed.from_json(stored[0], store.uri(key))
        with suppress(ObjectMissing):  # garbage collection may have deleted the answers, but not this reference to them
            folders.read_manifest(store, store.key(replayed.dataset_uri).rstrip("/"))
            log(
                f"{replayed.version} has answered these records before"
                if replayed.version
                else "these records are replayed as they are, as in an earlier run"
            )
            return replayed
    records = load_split(store, dataset_uri, "replay")
    right: dict[str, Record] = {}
    if version is None:
        log(f"nothing is in production yet: {counted(len(records), 'earlier record')} replayed as they are")
    else:
        right = _right(config, store, version, records, run_id, log)
        log(
            f"{version} answers {len(right)} of {counted(len(records), 'earlier record')} rightly: these are replayed "
            "in its words"
            if right
            else f"no answer of {version} is right by data.replay_metric {config.data.replay_metric}, so that the "
            "records are replayed as they are: name a metric that fits the answers, such as rouge_l for texts"
        )
    uri = _published(store, dataset_uri, [right.get(record.id, record) for record in records])
    replayed = Replayed(prepared_uri=dataset_uri, dataset_uri=uri, version=version, asked=len(records), kept=len(right))
    store.put(key, replayed.as_json(), content_type=JSON)
    return replayed


def _right(
    config: RunConfig, store: Store, version: str, records: Sequence[Record], run_id: str, log: Log
) -> dict[str, Record]:
    """The records that the version answers correctly, by id, with its answers; those with tool calls keep their own."""
    import ray

    from ray_jobs.planning.capacity import is_shared
    from ray_jobs.training.measuring import Task
    from ray_jobs.training.starting import resolve_base
    from ray_jobs.training.trainer import measured, on_the_cluster

    config = on_the_cluster(config, log)
    champion = of_version("champion", config, store, resolve(store, f"{config.adapter.name}@{version}"))
    settings, _, shape, chat = resolve_base(champion.config, store, log, recorded=champion.base_identity)
    settings = with_room_for_answers(settings, records, chat)
    labels = alike(without_reasoning(record.answer_text) for record in records)
    champion = replace(champion, config=settings, alike=labels)
    task = Task([champion], records, shape, together=is_shared(config, shape, ray.nodes()))
    result = measured(task, store, run_id=run_id, name="ray-replay")
    return {
        record.id: record if record.calls else replace(record, answer=score.text)
        for record, score in zip(result.order(records), result.scores["champion"], strict=True)
        if score.text and score.marks[config.data.replay_metric] >= RIGHT
    }


def _published(store: Store, dataset_uri: str, answered: Sequence[Record]) -> str:
    """Publish a copy of the dataset with `answered` appended to its training records; returns its URI."""
    key = store.key(dataset_uri).rstrip("/")
    splits: tuple[SplitName, ...] = ("train", "eval", "replay")
    every = (some for split in splits for some in read_split(store, dataset_uri, split))
    columns = {name for some in every for name in present(batch_of(some))}  # optional ones that a record needs
    with tempfile.TemporaryDirectory(prefix="fineloop-replay-") as folder:
        rejects = Path(folder, REJECTS)
        store.download(f"{key}/{REJECTS}", rejects)
        written = dataset.write_splits(
            Path(folder),
            map(batch_of, chain(read_split(store, dataset_uri, "train"), [answered])),
            map(batch_of, read_split(store, dataset_uri, "eval")),
            columns=columns,
        )
        profile = {**store.get_json(f"{key}/profile.json"), "replayed_beside": dataset_uri}
        rejected = folders.read_manifest(store, key).about["rejected"]
        return dataset.publish_dataset(store, written, rejects=rejects, rejected=rejected, profile=profile).uri
