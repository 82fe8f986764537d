"""The registry as a source of adapters for vLLM: what is asked for by NAME@ALIAS or NAME@VERSION is fetched, verified.

vLLM calls `register` when it starts, by the entry point group vllm.general_plugins, and asks a resolver for each
adapter that it does not serve yet (vllm/entrypoints/openai/models/serving.py, OpenAIServingModels.resolve_lora). What
it gets is named by its version: vLLM answers from the prefixes that it cached of an adapter's name
(vllm-project/vllm#42125), and no two versions share one. What NAME@ALIAS was resolved to, it keeps until POST
/v1/unload_lora_adapter names that.
"""

import asyncio
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import config_file
from components.config.schema import RegistryConfig
from components.registry import serving
from components.registry.store import Store
from components.registry.versions import pull_version, read_lineage, resolve
from components.shared.errors import ObjectMissing, UserError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "FINELOOP_LORA_FOLDER"
"""Where vLLM's copies go. Without it `register` does nothing."""
CONFIG_VARIABLE = "FINELOOP_LORA_CONFIG"
"""A config whose section `registry` says where the registry lies and whom it trusts; without it, the default's."""
NAME = "fineloop"


class RegistryResolver:
    """What vLLM takes for one of its `LoRAResolver`s."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder
        self._one_at_a_time = asyncio.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> "LoRARequest | None":
        """The version that the name means, at its verified copy; None where the registry has none for this base.

        Raises:
            IntegrityError: the version is damaged, or signed by no trusted key.
            StoreError: the registry cannot be reached.
        """
        from vllm.lora.request import LoRARequest

        async with self._one_at_a_time:  # two names may mean one version
            found = await asyncio.to_thread(self._fetched, base_model_name, lora_name)
        if found is None:
            return None
        version, path = found
        # vLLM puts a number of its own in the place of ours, which has to be positive.
        return LoRARequest(lora_name=version, lora_int_id=1, lora_path=str(path))

    def _fetched(self, base_model_name: str, lora_name: str) -> tuple[str, Path] | None:
        try:
            version = resolve(self._store, lora_name)
        except (UserError, ObjectMissing) as exc:
            logger.info("%s is no adapter of the registry: %s", lora_name, exc)
            return None
        lineage = read_lineage(self._store, version)
        base, kind = lineage["base"]["reference"], serving.recorded(lineage)
        if base != base_model_name or kind.servable_as != "lora":
            why = f"it stands on {base}" if base != base_model_name else "; ".join(kind.notes)
            logger.warning("%s %s is not served on %s: %s", version.name, version.version, base_model_name, why)
            return None
        target = self._folder / f"{version.name}-{version.version}"
        pull_version(self._store, version, target)
        return f"{version.name}@{version.version}", target


def register() -> None:
    """Add the resolver to vLLM's, where FINELOOP_LORA_FOLDER names the folder for its copies.

    Raises:
        ConfigError: the config that FINELOOP_LORA_CONFIG names does not exist or is not valid.
    """
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if not folder:
        return
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    config = os.environ.get(CONFIG_VARIABLE, "")
    registry = config_file.load(Path(config)).registry if config else RegistryConfig()
    LoRAResolver.register(RegistryResolver)
    LoRAResolverRegistry.register_resolver(NAME, RegistryResolver(Store.open(registry), Path(folder).absolute()))
