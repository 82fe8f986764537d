"""Versions of a release's own run, published anew with other words in them."""

import json
from dataclasses import dataclass
from typing import Any

from components.handover.serve_manifest import CONFIG
from components.registry.versions import Version, publish_version
from components.store.store import Store
from tests.frozen import registry


@dataclass(frozen=True)
class Written:
    """A version that a run of a release wrote, to be published with other words in it."""

    files: dict[str, bytes]
    lineage: dict[str, Any]
    adapter: dict[str, Any]

    def published(self, store: Store) -> Version:
        config = json.dumps(self.adapter).encode()
        return publish_version(store, "icd", {**self.files, CONFIG: config}, lineage=self.lineage)


def written(*, run_id: str = "promoted", base: str = "org/base", commit: str = "a" * 40) -> Written:
    """By the run `run_id`; its base is a hub's where one is named."""
    runs = registry.HERE / registry.RELEASES[0] / "registry"
    version = json.loads((runs / "runs" / run_id / "finetune.json").read_text())["version"]
    files = {path.name: path.read_bytes() for path in (runs / "adapters/colours/versions" / version).iterdir()}
    lineage, adapter = json.loads(files["lineage.json"]), json.loads(files[CONFIG])
    if base:
        lineage["base"] = {"reference": base, "identity": {"kind": "hub", "commit": commit}}
        adapter["base_model_name_or_path"] = base
    kept = {"adapter_model.safetensors": files["adapter_model.safetensors"]}
    return Written(kept, {key: value for key, value in lineage.items() if key != "files"}, adapter)
