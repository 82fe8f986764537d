"""LoftQ: a base of the adapter's own, whose NF4 weights and starting A and B were chosen together (arXiv:2310.08659).

With more than one step the NF4 weights are no longer those of the original, so the adapter belongs to this base and to
no other. It is a folder of its own in the store, made once by all workers and from then on only pulled:

bases/<id>/   a transformers model, quantised already: `from_pretrained` loads it as it is
              loftq_init.safetensors   for each layer R and L of W = Q + L R, as lora_A and lora_B of scaling 1
              loftq.json               what it was made from, and what NF4 loses of each weight, before and after
"""

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from components.config.schema import MethodConfig, RunConfig
from components.registry import folders
from components.registry.store import Store, encode_json
from components.shared.errors import Conflict, FineloopError
from components.shared.protocol import say
from ray_jobs.adapters.loftq import make
from ray_jobs.adapters.loftq.make import INIT
from ray_jobs.adapters.loftq.split import NF4, Split
from ray_jobs.base import base_model
from ray_jobs.base.base_model import Base

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

FORMAT = 1  # of the folder and of the arithmetic: another one is another base
REPORT = "loftq.json"


def prepare(config: RunConfig, original: Base, store: Store, *, rank: int = 0, num_workers: int = 1) -> Base:
    """The base of this config's own.

    Where the store does not have it yet, all workers make it together: with several, every one of them must call
    this, in an initialised process group, and before anything (as ZeRO-3 does) changes how models are loaded.

    Raises:
        ConfigError: the layers cannot be split, or doing so gains nothing.
    """
    key = folder_key(config.method, original)
    with _gloo_group(num_workers) as group:
        is_missing = rank == 0 and folders.find_manifest(store, key) is None
        if _from_rank_0(is_missing, group):
            splits = make.split_together(config, original, rank=rank, num_workers=num_workers, group=group)
            failure = None
            try:
                if rank == 0:
                    _publish(config, original, store, key, splits)
            except FineloopError as exc:  # every worker must end, and for the same reason
                failure = exc
            failure = _from_rank_0(failure, group)
            if failure is not None:
                raise failure
    return find(config, original, store)


def find(config: RunConfig, original: Base, store: Store) -> Base:
    """As `stand`, for who only reads: brings the base from the store into the cache, every byte verified.

    Raises:
        ObjectMissing: it was never made.
    """
    key = folder_key(config.method, original)
    sha256 = folders.read_manifest(store, key).sha256
    path = base_model.cache_dir() / f"loftq-{sha256[:16]}"

    def pull(target: Path) -> None:
        folders.pull(store, key, target, manifest_sha256=sha256)

    base_model.once(path, pull)
    pull(path)  # what the cache held before is verified
    return Base(store.uri(key), path, {"kind": "loftq", "manifest_sha256": sha256})


def begin(adapted: "PeftModel", base: Base) -> None:
    """Begin a fresh adapter where the split left off: s B A = L R, whatever its scaling s."""
    from safetensors import safe_open

    with safe_open(base.path / INIT, framework="pt") as init, torch.no_grad():
        for layer in adapted.targeted_module_names:
            module: Any = adapted.get_base_model().get_submodule(layer)
            root = module.scaling["default"] ** 0.5
            for factor in ("lora_A", "lora_B"):
                getattr(module, factor)["default"].weight.copy_(init.get_tensor(f"{layer}.{factor}") / root)


def recipe(base: Base) -> dict[str, Any]:
    """For the lineage: how the base was made and what that gained."""
    return {"loftq": json.loads((base.path / REPORT).read_text(encoding="utf-8"))}


def folder_key(method: MethodConfig, original: Base) -> str:
    """Where the base lies in the store. All that Q, L and R depend on is in the name; scaling and alpha are not."""
    return f"bases/{hashlib.sha256(encode_json(_made_from(method, original))).hexdigest()[:16]}"


def _made_from(method: MethodConfig, original: Base) -> dict[str, Any]:
    targets = method.target_modules
    return {
        "format": FORMAT,
        "original": original.identity,
        "target_modules": targets if isinstance(targets, str) else sorted(set(targets)),
        "rank": method.r,
        "steps": method.loftq_steps,
        "quantization": {setting: str(value) for setting, value in NF4.items()},
    }


def _publish(config: RunConfig, original: Base, store: Store, key: str, splits: Mapping[str, Split]) -> None:
    lost = make.lost_shares(splits)
    changes = ", ".join(f"{kind} {each['nf4']:.4f} -> {each['loftq']:.4f}" for kind, each in lost.items())
    say("finetune", f"LoftQ: share of the weights' norm that is lost, NF4 -> LoftQ: {changes}")
    about = {"original_reference": original.reference, **_made_from(config.method, original), "lost_shares": lost}
    with tempfile.TemporaryDirectory(prefix="fineloop-loftq-") as scratch:
        folder = Path(scratch)
        make.write(config, original, splits, folder)
        (folder / REPORT).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files: dict[str, bytes | Path] = {path.name: path for path in folder.iterdir()}
        try:
            folders.publish(store, key, files, about=about)
        except Conflict:  # another run, perhaps on other hardware, was faster: everybody stands on its base
            logger.info("%s was published by another run meanwhile", store.uri(key))


def _from_rank_0(value: Any, group: "ProcessGroup | None") -> Any:
    import torch.distributed as dist

    box = [value]
    if group is not None:
        dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


@contextlib.contextmanager
def _gloo_group(num_workers: int) -> Iterator["ProcessGroup | None"]:
    """All workers, over the CPU whatever training uses, since Python objects pass; None for a single one."""
    import torch.distributed as dist

    if num_workers == 1:
        yield None
        return
    group = dist.new_group(backend="gloo")
    try:
        yield group
    finally:
        dist.destroy_process_group(group)
