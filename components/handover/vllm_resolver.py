"""The registry as a source of adapters for vLLM: a request for NAME@ALIAS or NAME@VERSION is fetched and verified.

vLLM calls `register` when it starts, by the entry point group vllm.general_plugins, and asks a resolver for each
adapter that it does not serve yet (vllm/entrypoints/openai/models/serving.py, OpenAIServingModels.resolve_lora). The
adapter that it gets is named by its version: vLLM answers from the prefixes that it cached under an adapter's name
(vllm-project/vllm#42125), and no two versions share a name. vLLM keeps the version that NAME@ALIAS was resolved to
until POST /v1/unload_lora_adapter names NAME@ALIAS.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import config_file
from components.config.schema import RegistryConfig
from components.handover.serve_manifest import FOLDER_VARIABLE, base_of, served
from components.registry.aliases import list_aliases
from components.registry.event_log import read_event
from components.registry.versions import pull_version, resolve
from components.shared.errors import ObjectMissing, UserError
from components.store.store import Store

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

CONFIG_VARIABLE = "FINELOOP_LORA_CONFIG"
"""The variable with the path of a config whose section `registry` applies; without it, that section's defaults."""
ANY_VARIABLE = "FINELOOP_LORA_ANY_VERSION"
"""The variable that, set to 1, also serves versions that no alias ever held, such as one that the gate refused."""


class RegistryResolver:
    """A resolver with the interface of vLLM's `LoRAResolver`."""

    def __init__(self, store: Store, folder: Path, *, any_version: bool = False) -> None:
        self._store, self._folder, self._any_version = store, folder / "copies", any_version
        self._one_at_a_time = asyncio.Lock()
        self._lock: int | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> "LoRARequest | None":
        """A request for a verified copy of the version that the name means; None if there is none for this base. Raises
        IntegrityError if it is damaged, or signed by no trusted key; StoreError: the registry cannot be reached."""
        from vllm.lora.request import LoRARequest

        async with self._one_at_a_time:  # two names may mean one version
            fetched = await asyncio.to_thread(self._fetched, base_model_name, lora_name)
        if fetched is None:
            return None
        version, path = fetched
        # vLLM replaces our number, which has to be positive, by its own.
        return LoRARequest(lora_name=version, lora_int_id=1, lora_path=str(path))

    def _fetched(self, base_model_name: str, lora_name: str) -> tuple[str, Path] | None:
        try:
            version = resolve(self._store, lora_name)
            may_be_served = self._any_version or version.aliases
            if not may_be_served and version.version not in _in_use_once(self._store, version.name):
                raise UserError(f"no alias points at it or ever held it, and {ANY_VARIABLE} is not 1")
            facts = served(self._store, version)
            if facts.base != base_model_name and base_of(Path(base_model_name)) != facts.base_identity:
                raise UserError(f"it stands on {facts.base}")
        except (UserError, ObjectMissing) as exc:
            logger.warning("%s is not served on %s: %s", lora_name, base_model_name, exc)
            return None
        if self._lock is None:
            self._lock = _taken(self._folder)
        target = self._folder / f"{version.name}-{version.version}"
        pull_version(self._store, version, target)
        return f"{version.name}@{version.version}", target


def _in_use_once(store: Store, name: str) -> set[str]:
    """The versions that an alias points at or held: each alias's moves are followed back from its pointer, and not from
    the whole log, to which every training may add. Raises IntegrityError if one of the moves is damaged or gone."""
    versions: set[str] = set()
    for pointer in list_aliases(store, name):
        move = pointer.event
        versions.add(pointer.version)
        while previous := move.get("previous"):
            move = read_event(store, name, previous).body
            versions.add(move["to"])
    return versions


def _taken(folder: Path) -> int:
    """Lock the folder for copies until this process ends: vLLM may read one again. If no process holds it, empty it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for copy in folder.iterdir():
            shutil.rmtree(copy)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def register() -> None:
    """Add the resolver to vLLM's, if FINELOOP_LORA_FOLDER names the folder for its copies. Raises ConfigError: the
    config that FINELOOP_LORA_CONFIG names does not exist or is not valid."""
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if not folder:
        return
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    config = os.environ.get(CONFIG_VARIABLE, "")
    registry = config_file.load(Path(config)).registry if config else RegistryConfig()
    LoRAResolver.register(RegistryResolver)
    resolver = RegistryResolver(
        Store.open(registry), Path(folder).absolute(), any_version=os.environ.get(ANY_VARIABLE) == "1"
    )
    LoRAResolverRegistry.register_resolver("fineloop", resolver)
