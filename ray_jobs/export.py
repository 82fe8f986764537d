"""Write a version in another form: `python -m ray_jobs.export --version NAME --to DIR --form merged|lora|gguf|base`.

merged   the adapter's update in the weights of its base: a transformers folder that needs no peft
gguf     the same as one file of llama.cpp's, with a Modelfile for Ollama
lora     the same function as plain LoRA, where it is one; what already is plain is copied
base     the base that it was trained on, as an ordinary transformers folder for servers; weights as they are

Each other result is compared with the adapter on its base before anything appears at DIR; the merge is compared before
it is rounded to the saved dtype. The last line of stdout is the content of DIR/export.json.
"""

import argparse
import json
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from components.config.schema import RunConfig
from components.prepare.dataset import Record, load_split
from components.registry.versions import Version, pull_version, resolve
from components.shared import garbage
from components.shared.errors import ObjectMissing, UserError
from components.shared.protocol import say
from components.store.folders import beside
from components.store.store import Store

with garbage.importing():
    from ray_jobs import entry
    from ray_jobs.adapters import build, merge, own_base, recorded
    from ray_jobs.adapters.merge import Agreement
    from ray_jobs.base import architecture, base_model, local_cache
    from ray_jobs.base.base_model import Base
    from ray_jobs.kernels import door
    from ray_jobs.kernels.door import Kernels
    from ray_jobs.planning.capacity import on_gpus, require_float32
    from ray_jobs.scoring.answers import USUAL_NEW_TOKENS
    from ray_jobs.talking import speaker
    from ray_jobs.text import chat_format, ollama
    from ray_jobs.text.batching import TokenizedSplit, tokenize
    from ray_jobs.text.chat_format import ChatFormat
    from ray_jobs.training import publishing

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

STEP = "export"
MAX_RECORDS, MAX_POSITIONS = 64, 1024
"""Limits of the comparison: about this many positions, at least one record, as the logits are held in memory."""

Form = Literal["merged", "lora", "gguf", "base"]
BaseWeights = Literal["dequantised", "original"]
Dtype = Literal["float32", "bfloat16", "float16"]
USUAL_DTYPE: dict[Form, Dtype] = {"gguf": "float16"}
"""Default dtypes that differ from bfloat16: Ollama does not quantise bfloat16 (ollama v0.17, server/create.go)."""


@dataclass(frozen=True)
class ExportRequest:
    """The export that the user asked for."""

    form: Form
    target: Path
    base: BaseWeights | None = None
    """Base weights to merge into; not for LoRA. None means those that the adapter was trained on."""
    dtype: Dtype = "bfloat16"
    """Dtype to save the weights in; not for LoRA."""
    approximate: int = 0
    """LoRA only: rank of the nearest LoRA where no LoRA is exact; 0 refuses such adapters."""
    converter: Path | None = None
    """GGUF only: path of llama.cpp's converter. None means the one on PATH."""


@dataclass(frozen=True)
class ExportSource:
    """A version on this machine: its adapter, the adapter's base, and the records to compare on."""

    version: Version
    config: RunConfig
    """The config, with the base and the method of the version's own run."""
    folder: Path
    """The adapter's files."""
    original: Base
    stands_on: Base
    """The base that the adapter was trained on: the original, or a base of the adapter's own."""
    chat: ChatFormat
    system: str
    """The system message that all of its training records begin with; empty if there is none."""
    rows: Sequence["torch.Tensor"]
    compared_on: str
    records: Sequence[Record]
    """Held-out records, whose tokens are `rows`; empty where the dataset is gone and the rows are random."""
    split: TokenizedSplit
    max_new_tokens: int
    kernels: Kernels
    use_gpu: bool


def main() -> None:
    """Run the job of this command line, and exit with its code."""
    parser = entry.parser("ray_jobs.export", __doc__)
    parser.add_argument("--version", required=True, help="NAME, NAME@ALIAS or NAME@VERSION")
    parser.add_argument("--to", required=True, type=Path, dest="target", help="folder to write; must not exist yet")
    parser.add_argument("--form", required=True, choices=get_args(Form))
    parser.add_argument("--base", choices=("dequantised", "original"), help="not for lora: the weights merged into")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="not for lora: as saved")
    parser.add_argument("--approximate", type=int, default=0, metavar="RANK", help="lora: the nearest where it is none")
    parser.add_argument("--converter", type=Path, help="gguf: llama.cpp's convert_hf_to_gguf.py")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the cleanup of an unfinished folder runs

    def job(config: RunConfig, arguments: argparse.Namespace) -> None:
        options = {name: getattr(arguments, name) for name in ("base", "approximate", "converter")}
        options["dtype"] = arguments.dtype or USUAL_DTYPE.get(arguments.form, "bfloat16")
        request = ExportRequest(arguments.form, arguments.target, **options)
        print(json.dumps(export(config, arguments.version, request)), flush=True)  # noqa: T201 - stdout is the answer

    entry.main(STEP, parser, job)


def export(config: RunConfig, reference: str, request: ExportRequest) -> dict[str, Any]:
    """Write the whole of `request.target`, or leave nothing there; returns the content of its export.json.

    Raises:
        UserError: the target is not empty, or the version cannot be exported in this form.
        IntegrityError: the base no longer exists as it was during training.
        FineloopError: the exported model does not agree with the adapter on its base.
    """
    store = Store.open(config.registry)
    version = resolve(store, reference)
    if request.target.exists() and (request.target.is_file() or any(request.target.iterdir())):
        raise UserError(f"{request.target} exists and is not empty: remove it or choose another --to")
    if request.form == "gguf":
        merge.converter(request.converter)  # before anything is loaded
    with tempfile.TemporaryDirectory(prefix="fineloop-adapter-") as scratch, beside(request.target) as folder:
        its_run, adapter = recorded.read(config, store, version), Path(scratch) / "adapter"
        pull_version(store, version, adapter)
        record: dict[str, Any]
        if request.form == "base":
            record = _base(its_run, version, adapter, folder)
        elif request.form == "lora" and merge.is_plain(adapter):
            say(STEP, "it is a plain LoRA already: its files are copied, as `fineloop adapters pull` gives them")
            shutil.copytree(adapter, folder, dirs_exist_ok=True)
            record = {"form": "lora", "version": version.version, "exact": True}
        else:
            source = _source(config, store, version, its_run, adapter)
            say(STEP, f"{version.name} {version.version} is compared on {source.compared_on}")
            record = _lora(source, request, folder) if request.form == "lora" else _merged(source, request, folder)
            (folder / "README.md").write_text(
                publishing.export_card(source.config.method.name, record), encoding="utf-8"
            )
        (folder / "export.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        folder.rename(request.target)
    say(STEP, f"{version.name} {version.version}, {request.form}, is at {request.target}")
    return record


def _base(its_run: recorded.Recorded, version: Version, adapter: Path, folder: Path) -> dict[str, Any]:
    """Copy the base as it was before any quantising; it is prompted and stopped as the adapter was trained."""
    config = its_run.config.model
    base = base_model.resolve(config, recorded=its_run.base_identity)
    patterns = [*base_model.FILES, *(local_cache.CODE_FILES if config.trust_remote_code else [])]
    for file in {path for pattern in patterns for path in base.path.glob(pattern)} - {base.path / local_cache.DIGESTS}:
        shutil.copyfile(file, folder / file.name)
    chat = chat_format.of_version(version, adapter, base, config)
    chat.tokenizer.save_pretrained(folder)
    chat.generation_config().save_pretrained(folder)
    licence, files = base_model.licence(base)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    record = {
        "form": "base",
        "adapter": version.name,
        "version": version.version,
        "base_model": {"reference": base.reference, "identity": base.identity, "license": licence},
    }
    (folder / "README.md").write_text(publishing.base_card(record), encoding="utf-8")
    return record


def _merged(source: ExportSource, request: ExportRequest, folder: Path) -> dict[str, Any]:
    """Merge in float32, compare, save, and compare again after loading the saved files."""
    import torch

    row, rows = source.config.method.row, source.rows
    weights: BaseWeights = "original" if row.base == "bf16" else request.base or "dequantised"
    is_exact = row.base == "bf16" or weights == "dequantised"
    if not is_exact and source.stands_on != source.original:
        raise UserError(
            f"this adapter was chosen together with a base of its own, {source.stands_on.reference}, and is wrong on "
            "the original: use --base dequantised"
        )
    evaluated, answers, dense = _evaluated(source)
    say(STEP, "running the adapter in float32 on the weights that it was trained on")
    adapted = build.load(dense, source.folder).eval()
    del dense
    reference = list(_logits(adapted, rows))
    with adapted.disable_adapter():
        effect = merge.agreement(reference, _logits(adapted, rows))
    before = reference
    if not is_exact:
        say(STEP, "running it on the original weights")
        del adapted  # one base in memory at a time
        adapted = build.load(_dense(source), source.folder).eval()
        before = list(_logits(adapted, rows))
    say(STEP, f"merging into the {weights} weights")
    merged = merge.merge(adapted)
    parity = {"merge": merge.agreement(before, _logits(merged, rows))}
    merge.require_same(parity["merge"], "the merged model")
    del adapted

    dtype = getattr(torch, request.dtype)
    plain = folder if request.form == "merged" else folder / "merged"
    load = _saved(source, request, merged.to(dtype), plain)
    del merged
    form: dict[str, Any] = {"warnings": []}
    if request.form == "gguf":
        form, load = _gguf(source, request, plain, folder, load)
    if request.dtype != "float32":  # read back in float32, so that only the weights are rounded
        parity["rounded"] = merge.agreement(before, _logits(load(dtype=torch.float32).eval(), rows))
    reloaded = load(dtype=dtype).eval()
    source.kernels.adopt(reloaded)
    saved = list(_logits(reloaded, rows))
    parity |= {"saved": merge.agreement(reference, saved), "evaluated": merge.agreement(evaluated, saved)}
    if not math.isfinite(parity["saved"].mean_kl_nats):
        raise UserError(f"the saved model says nothing finite when it runs in {request.dtype}: use --dtype bfloat16")
    if is_exact and request.dtype == "float32":
        merge.require_same(parity["saved"], "the saved model")
    parity["effect"] = effect
    if "rounded" in parity:
        form["warnings"] += merge.rounding_warnings(request.dtype, parity["rounded"], effect)
    both = {"adapter": answers, "exported": _answers(source, reloaded)} if answers else {}
    lines = [f"{name}: {result.summary()}" for name, result in parity.items()]
    for line in [*lines, *(f"warning: {warning}" for warning in form["warnings"])]:
        say(STEP, line)
    for who, scores in both.items():
        right = f"{scores['exact_match']:.1%} of {len(source.records)} as held out"
        say(STEP, f"answers of the {who}: {right}, loss {scores['loss']:.3f} nats a token")
    if plain != folder:
        shutil.rmtree(plain)
    return _record(source, request, parity, base=weights, dtype=request.dtype, answers=both, **form)


def _saved(source: ExportSource, request: ExportRequest, merged: "PreTrainedModel", folder: Path) -> Callable[..., Any]:
    """Save the merged model as a transformers folder; returns a function that loads it in a given dtype."""
    say(STEP, f"saving as {request.dtype}")
    if overflown := [name for name, weight in merged.named_parameters() if not weight.isfinite().all()]:
        raise UserError(f"{overflown[0]} does not fit into {request.dtype}, which ends at 65,504: use --dtype bfloat16")
    merged.generation_config = source.chat.generation_config()  # the exported model generates as it was evaluated
    merged.save_pretrained(folder, max_shard_size="5GB")
    source.chat.tokenizer.save_pretrained(folder)
    return partial(architecture.auto_class(merged.config).from_pretrained, folder)


def _gguf(
    source: ExportSource, request: ExportRequest, plain: Path, folder: Path, load: Callable[..., Any]
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """Convert the merged folder `plain` to a GGUF with a Modelfile; returns entries of the record, and the loader."""
    version, model = source.version, source.config.model
    file = folder / f"{version.name}-{version.version}.gguf"
    if (sentencepiece := source.original.path / "tokenizer.model").is_file():  # some converters need it
        shutil.copy(sentencepiece, plain)
    say(STEP, f"converting it to {file.name}")
    title = f"{version.name} {version.version}"
    merge.convert_to_gguf(merge.converter(request.converter), plain, file, dtype=request.dtype, name=title)
    positions = base_model.positions(base_model.load_config(plain, model))
    length = min(positions or model.max_length, max(model.max_length, ollama.USUAL_CONTEXT))
    form: dict[str, Any] = {"warnings": merge.write_modelfile(file, source.chat, title, source.system, length)}

    def filled(**how: Any) -> Any:
        model = load(**how)
        form["tensors"] = merge.fill(model, file)
        return model

    return form, filled


def _lora(source: ExportSource, request: ExportRequest, folder: Path) -> dict[str, Any]:
    """Convert the adapter on the dense base, and compare both in float32."""
    rows = source.rows
    adapted = build.load(_trained_on(source, _loaded(source)), source.folder).eval()
    reference = list(_logits(adapted, rows))
    exact = not (request.approximate and source.config.method.row.adapter in ("dora", "dvora"))
    say(STEP, "rewriting it as plain LoRA" if exact else f"looking for the nearest LoRA of rank {request.approximate}")
    plain = merge.as_lora(adapted) if exact else merge.nearest_lora(adapted, rank=request.approximate)
    build.save(plain, folder)
    rank = plain.peft_config["default"].r
    plain = build.load(plain.unload(), folder).eval()  # as it is read from its files
    parity = {"converted": merge.agreement(reference, _logits(plain, rows))}
    if exact:
        merge.require_same(parity["converted"], "the converted adapter")
    say(STEP, f"converted: {parity['converted'].summary()}")
    return _record(source, request, parity, exact=exact, rank=rank)


def _source(
    run_config: RunConfig, store: Store, version: Version, its_run: recorded.Recorded, folder: Path
) -> ExportSource:
    import torch

    config = its_run.config
    say(STEP, f"loading {config.model.base}")
    original = base_model.resolve(config.model, recorded=its_run.base_identity)
    chat = chat_format.of_version(version, folder, original, config.model)
    records, split = _held_out(store, its_run.dataset_uri, chat, config.model.max_length)
    rows = [torch.from_numpy(split.tokens[start:end]).long() for start, end in pairwise(split.offsets)]
    compared_on = f"{len(rows)} held-out records of {its_run.dataset_uri}"
    if not rows:
        length = min(64, config.model.max_length)
        rows, compared_on = list(merge.vocabulary_rows(len(chat.tokenizer), count=16, length=length)), "random tokens"
    require_float32(config, original)
    use_gpu = on_gpus(config, original)
    kernels = door.choose(run_config, base_model.load_config(original.path, config.model), on_gpu=use_gpu)
    stands_on = own_base.find(config, original, store, sha256=its_run.stands_on_sha256)
    compared = (rows, compared_on, records, split, its_run.max_new_tokens or USUAL_NEW_TOKENS)
    system = speaker.as_trained(run_config, store, version).system if records else ""
    return ExportSource(version, config, folder, original, stands_on, chat, system, *compared, kernels, use_gpu)


def _held_out(store: Store, uri: str, chat: ChatFormat, max_length: int) -> tuple[list[Record], TokenizedSplit]:
    """Held-out records and their tokens; empty where the dataset is gone."""
    try:
        records = load_split(store, uri, "eval")[:MAX_RECORDS]
    except (ObjectMissing, UserError) as exc:  # deleted, or not moved with the registry
        say(STEP, f"the data is gone ({exc})")
        records = []
    split = tokenize(records, chat, max_length)
    split = split.take([row for row, start in enumerate(split.offsets[:-1]) if start < MAX_POSITIONS])
    ids = set(split.ids)
    return [record for record in records if record.id in ids], split


def _loaded(source: ExportSource) -> "PreTrainedModel":
    """The base as it is loaded for training and evaluation."""
    base_format = source.config.method.row.base
    about = {"use_gpu": source.use_gpu, "across_gpus": True}
    return door.load_model(source.stands_on, source.config.model, base_format, source.kernels, **about)


def _dense(source: ExportSource) -> "PreTrainedModel":
    """The original base in float32 on the CPU, with its weights rounded to bfloat16, as in all its uses."""
    model = source.config.model
    if stored := architecture.stored_as(base_model.load_config(source.original.path, model)):
        return merge.unquantised(base_model.load_model(source.original, model, stored, use_gpu=False))
    return base_model.load_model(source.original, model, "bf16", use_gpu=False).float()


def _trained_on(source: ExportSource, loaded: "PreTrainedModel") -> "PreTrainedModel":
    """The weights that the adapter was trained on, in float32 on the CPU."""
    return loaded.float().cpu() if source.config.method.row.base == "bf16" else merge.unquantised(loaded)


def _evaluated(source: ExportSource) -> tuple[list["torch.Tensor"], dict[str, float], "PreTrainedModel"]:
    """Logits and answers of the adapter as evaluation runs it, and its base in float32, without the adapter."""
    adapted: PeftModel = source.kernels.adopt(build.load(_loaded(source), source.folder)).eval()
    evaluated = list(_logits(adapted, source.rows))
    answers = _answers(source, adapted)
    return evaluated, answers, _trained_on(source, adapted.unload())


def _answers(source: ExportSource, model: Any) -> dict[str, float]:
    """Exact match and loss on the held-out records, measured as in evaluation; empty where there are no records."""
    from ray_jobs.scoring.generation import score

    if not source.records:
        return {}
    scores = score(
        model,
        source.chat,
        source.records,
        source.split,
        batch_size=source.config.evaluate.batch_size,
        max_new_tokens=source.max_new_tokens,
        advance=lambda _: None,
    )
    right = sum(answer.marks["exact_match"] for answer in scores)
    tokens = int(source.split.num_answer_tokens.sum())
    return {"exact_match": right / len(scores), "loss": sum(answer.nll for answer in scores) / tokens}


def _logits(model: Any, rows: Sequence["torch.Tensor"]) -> Iterator["torch.Tensor"]:
    """Those of `merge.logits`; says how far it is every ten seconds."""
    said_at = time.monotonic()
    for number, logits in enumerate(merge.logits(model, rows), start=1):
        if time.monotonic() - said_at > 10:
            say(STEP, f"{number} of {len(rows)} records")
            said_at = time.monotonic()
        yield logits


def _record(source: ExportSource, request: ExportRequest, parity: dict[str, Agreement], **form: Any) -> dict[str, Any]:
    version, method = source.version, source.config.method
    return {
        "form": request.form,
        "adapter": version.name,
        "version": version.version,
        "version_uri": version.uri,
        "manifest_sha256": version.manifest_sha256,
        "run_id": version.run_id,
        "method": method.name,
        "base_model": {
            "reference": source.original.reference,
            "identity": source.original.identity,
            "stands_on": source.stands_on.reference,
            "format": method.row.base,
        },
        **form,
        "parity": {"compared_on": source.compared_on, **{name: asdict(result) for name, result in parity.items()}},
    }


if __name__ == "__main__":
    main()
