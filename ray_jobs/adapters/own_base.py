"""The base of an adapter: the original, or one of its own that was computed together with the adapter's first weights.

`method.init` says which. A base of an adapter's own belongs to it and to no other. All workers make it together, once.
It is stored as `made_base` describes, with two more files in its folder:

<init>_init.safetensors   the adapter's first weights: LAYER.lora_A and LAYER.lora_B, as of scaling 1
<init>.json               what it was made from, and what its making measured

`ray_jobs/adapters/<init>/start.py` says how one is made: a module with the four functions of `Start`, as LoftQ's is.
No other code refers to a start by its name.
"""

import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from components.config.methods import OWN_BASE, Init
from components.config.schema import MethodConfig, RunConfig
from components.shared.errors import IntegrityError, ObjectMissing
from components.store.store import Store
from ray_jobs.base import made_base, together
from ray_jobs.base.base_model import Base

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.distributed import ProcessGroup


class Start(Protocol):
    """How adapters of one `method.init` are initialised together with a base of their own."""

    def check(self, config: RunConfig, original: Base) -> None:
        """Refuse an original base that no such base can be made from, without reading its weights."""

    def made_from(self, method: MethodConfig, original: Base) -> Mapping[str, Any]:
        """Everything that the base and the first weights depend on, as JSON values; the base's id is its hash."""

    def compute(
        self, config: RunConfig, original: Base, *, rank: int, num_workers: int, group: "ProcessGroup | None"
    ) -> Any:
        """Compute the base on all workers; rank 0 gets the result. Raises ConfigError on all workers or on none."""

    def write(self, config: RunConfig, original: Base, computed: Any, folder: Path, init_path: Path) -> dict[str, Any]:
        """Write the model to `folder` and the first weights to `init_path`, on rank 0; returns what was measured.

        The caller copies the other files of the original's folder, such as its tokenizer.

        Raises:
            ConfigError: the base is no better than the original.
        """


def start_of(init: Init) -> Start:
    """The module that makes the base of adapters with this start, one of OWN_BASE."""
    module: Any = importlib.import_module(f"ray_jobs.adapters.{init}.start")
    start: Start = module
    return start


def is_needed(method: MethodConfig) -> bool:
    """Whether adapters of this method have a base of their own."""
    return method.row.init in OWN_BASE


def check(config: RunConfig, original: Base) -> None:
    """Check what can be checked before any worker is started.

    Raises:
        ConfigError: `method.init` makes no base of the original.
    """
    if is_needed(config.method):
        start_of(config.method.row.init).check(config, original)


def prepare(
    config: RunConfig, original: Base, store: Store, *, sha256: str = "", rank: int = 0, num_workers: int = 1
) -> Base:
    """The base to train on; `sha256` as for `find`, where the training starts from a version.

    Where the store does not have it yet, all workers make it together. With several workers, every one of them must
    call this in an initialised process group, and before anything, such as ZeRO-3, changes how models are loaded.

    Raises:
        ConfigError: no such base can be made of the original.
    """
    if not is_needed(config.method):
        return original
    start = start_of(config.method.row.init)
    key = folder_key(config.method, original)
    with together.gloo_group(num_workers) as group:
        is_missing = rank == 0 and made_base.find(store, key) is None
        if together.from_rank_0(is_missing, group):
            computed = start.compute(config, original, rank=rank, num_workers=num_workers, group=group)
            together.on_rank_0(lambda: _publish(start, config, original, store, computed), rank=rank, group=group)
    return find(config, original, store, sha256=sha256)


def find(config: RunConfig, original: Base, store: Store, *, sha256: str) -> Base:
    """The base that an adapter of this config was trained on, pulled into the cache with every byte verified.

    `sha256` is that of its manifest by the version's lineage. Empty accepts the base that the store has now.

    Raises:
        ObjectMissing: it was never made.
        IntegrityError: it is damaged, another than the lineage's, or comes with code that is not the original's and may
            run.
    """
    init = config.method.row.init
    if init not in OWN_BASE:
        return original
    key = folder_key(config.method, original)
    made = made_base.find(store, key)
    if made is None:
        raise ObjectMissing(f"{store.uri(key)} does not exist: it has no {made_base.CHOSEN}")
    if sha256 not in ("", made.manifest_sha256):
        raise IntegrityError(
            f"the adapter was trained on the base in {store.uri(key)} whose manifest has sha256 {sha256}, and today "
            f"that is {made.manifest_sha256}: put the one that it was trained on back there, or train it again"
        )
    path = made_base.pull(store, made, init)
    if config.model.trust_remote_code:
        made_base.require_same_code(path, original)
    return Base(store.uri(made.key), path, {"kind": init, "manifest_sha256": made.manifest_sha256})


def begin(config: RunConfig, adapted: "PeftModel", base: Base) -> None:
    """Set the first weights of a fresh adapter on `base`, where they are not peft's own. The scaled product s B A is
    the one that was computed with the base, whatever the scaling s is."""
    import torch
    from safetensors import safe_open

    init = config.method.row.init
    if init not in OWN_BASE:
        return
    with safe_open(_init_path(base.path, init), framework="pt") as made, torch.no_grad():
        for layer in adapted.targeted_module_names:
            module: Any = adapted.get_base_model().get_submodule(layer)
            root = module.scaling["default"] ** 0.5
            for factor in ("lora_A", "lora_B"):
                getattr(module, factor)["default"].weight.copy_(made.get_tensor(f"{layer}.{factor}") / root)


def recipe(config: RunConfig, base: Base) -> dict[str, Any]:
    """What the lineage records of the base: how it was made, what that gained, and its sha256; empty for an original
    base."""
    init = config.method.row.init
    if init not in OWN_BASE:
        return {}
    made = json.loads(_report_path(base.path, init).read_text(encoding="utf-8"))
    return {init: made, "stands_on_sha256": base.identity["manifest_sha256"]}


def folder_key(method: MethodConfig, original: Base) -> str:
    """Key in the store of this method's own base: a hash of exactly what the base depends on."""
    return made_base.key_of(start_of(method.row.init).made_from(method, original))


def _init_path(folder: Path, init: Init) -> Path:
    return folder / f"{init}_init.safetensors"  # a name that transformers does not take for the model's weights


def _report_path(folder: Path, init: Init) -> Path:
    return folder / f"{init}.json"


def _publish(start: Start, config: RunConfig, original: Base, store: Store, computed: Any) -> None:
    init, key = config.method.row.init, folder_key(config.method, original)
    with tempfile.TemporaryDirectory(prefix="fineloop-base-") as scratch:
        folder = Path(scratch)
        found = start.write(config, original, computed, folder, _init_path(folder, init))
        about = {"original_reference": original.reference, **start.made_from(config.method, original), **found}
        _report_path(folder, init).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        made_base.publish(store, key, folder, original, about)
