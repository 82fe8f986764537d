"""What a training reads of a prepared dataset: the records to train on, and those to validate on."""

from collections.abc import Callable, Sequence

from components.config.schema import RunConfig
from components.prepare.dataset import Record, load_split
from components.prepare.held_out import validation_and_test
from components.registry import lineage
from components.shared.counted import counted
from components.shared.errors import DataError
from components.store import folders
from components.store.store import Store
from ray_jobs.text.batching import TokenizedSplit, tokenize
from ray_jobs.text.chat_format import ChatFormat

Log = Callable[[str], None]


def read(
    store: Store, dataset_uri: str, chat: ChatFormat, config: RunConfig, log: Log
) -> tuple[TokenizedSplit, TokenizedSplit]:
    """The training records and those that checkpoints, and the trainings of a sweep, are chosen on, as tokens.

    Raises:
        DataError: too many records are too long for `model.max_length`.
    """
    held_out = load_split(store, dataset_uri, "eval")
    validation, _ = validation_and_test(held_out, validation_share=config.data.validation_share)
    train_split, eval_split = (
        tokenized(records, chat, config, log) for records in (load_split(store, dataset_uri, "train"), validation)
    )
    return train_split, eval_split.take(range(min(config.train.eval_records, len(eval_split))))


def tokenized(records: Sequence[Record], chat: ChatFormat, config: RunConfig, log: Log) -> TokenizedSplit:
    """A split as tokens; `log` receives a line about records that are left out or cut.

    Raises:
        DataError: more of them than `data.max_reject_share` allows.
    """
    limit, allowed = config.model.max_length, config.data.max_reject_share
    split = tokenize(records, chat, limit, config.data.loss_on)

    def share(ids: list[str]) -> str:
        return f"{len(ids)} of {len(records)} records ({len(ids) / len(records):.0%}; as {ids[0]!r})"

    if len(split.too_long) > allowed * len(records) or not len(split):
        raise DataError(
            f"the answers of {share(split.too_long)} are too long for model.max_length {limit}, and none is ever cut: "
            f"raise it, shorten the answers, or allow their loss with data.max_reject_share (now {allowed:g})"
        )
    if len(split.cut) > allowed * len(records):
        raise DataError(
            f"the prompts of {share(split.cut)} are too long for model.max_length {limit} and would lose their "
            "beginning, with a system message and the markers of turns: raise it, shorten the prompts, or allow that "
            f"with data.max_reject_share (now {allowed:g})"
        )
    if split.too_long:
        log(f"left out {counted(len(split.too_long), 'record')}: their answers do not fit model.max_length {limit}")
    if split.cut:
        log(f"cut {len(split.cut)} prompts at their beginning: they do not fit model.max_length {limit}")
    return split


def of_dataset(store: Store, uri: str) -> lineage.Dataset:
    """The dataset as lineage names it."""
    manifest = folders.read_manifest(store, store.key(uri).rstrip("/"))
    about = manifest.about
    return lineage.Dataset(about["dataset_id"], uri, manifest.sha256, about["train_records"], about["eval_records"])
