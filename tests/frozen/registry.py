"""A registry as a release left it, on the session's S3 server: what every release after it must still read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.config import config_file
from components.config.schema import RegistryConfig, RunConfig
from components.store.store import Store

HERE = Path(__file__).parent
RELEASES = sorted(folder.parent.name for folder in HERE.glob("*/registry"))
BUCKET, PREFIX = "fineloop-tests", "frozen"
"""Every address in the records begins with these: they are readable in this place alone."""
PLACE = ("--set", f"registry.bucket={BUCKET}", "--set", f"registry.prefix={PREFIX}")
ADAPTER = "colours"


@dataclass(frozen=True)
class Frozen:
    """The store that holds a copy, and the files themselves as the truth about what was written."""

    store: Store
    folder: Path

    def path(self, key: str) -> Path:
        return self.folder / key

    def json(self, key: str) -> Any:
        return json.loads(self.path(key).read_text())

    def version(self, run_id: str) -> str:
        """What the run published."""
        return self.json(f"runs/{run_id}/finetune.json")["version"]

    def config(self, run_id: str, *overrides: str) -> RunConfig:
        """The run's own, as today's code reads it."""
        return config_file.load(self.path(f"runs/{run_id}/config.toml"), overrides)


def restored(release: str) -> Frozen:
    """The release's registry, whole and with nothing else beside it, where its addresses say that it lies."""
    store, folder = Store.open(RegistryConfig(bucket=BUCKET, prefix=PREFIX)), HERE / release / "registry"
    store.delete([entry.key for entry in store.list("")])
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path)
    return Frozen(store, folder)
