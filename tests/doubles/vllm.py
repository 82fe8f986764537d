"""vLLM's part in resolving an adapter by name: the interface of its plugins by signature, and how its server asks them.

After vllm-project/vllm at 4fe4500477d5bbf2c2a467adacc60f7d215cd655: vllm/lora/resolver.py, vllm/lora/request.py and
`resolve_lora` of vllm/entrypoints/openai/models/serving.py.
"""

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType

import pytest


@dataclass
class LoRARequest:
    """An adapter as the engine takes it."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")


class LoRAResolver(ABC):
    """What a plugin implements."""

    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


class Registry:
    """vllm.lora.resolver.LoRAResolverRegistry."""

    def __init__(self) -> None:
        self.resolvers: dict[str, LoRAResolver] = {}

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver


class Server:
    """OpenAIServingModels, as far as adapters go."""

    def __init__(self, registry: Registry, base_model_name: str) -> None:
        self.registry = registry
        self.resolvers = list(registry.resolvers.values())
        self.base_model_name = base_model_name
        self.lora_requests: dict[str, LoRARequest] = {}
        self.added: list[LoRARequest] = []

    async def resolve_lora(self, lora_name: str) -> LoRARequest | None:
        if lora_name in self.lora_requests:
            return self.lora_requests[lora_name]
        unique_id = len(self.added) + 1
        for resolver in self.resolvers:
            lora_request = await resolver.resolve_lora(self.base_model_name, lora_name)
            if lora_request is not None:
                lora_request.lora_int_id = unique_id
                self.added.append(lora_request)
                self.lora_requests[lora_name] = lora_request
                return lora_request
        return None

    def unload_lora_adapter(self, lora_name: str) -> None:
        del self.lora_requests[lora_name]


def installed(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Make `import vllm.lora...` find this; gives what plugins register with."""
    registry = Registry()
    parts = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": registry},
    }
    for name, attributes in parts.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return registry
