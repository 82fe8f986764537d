"""How many requests the registry makes with many adapters: `python -m benchmarks.registry_requests`.

One adapter is published, promoted and listed as always, and what that wrote is copied to the others, but weights and
lineage. A proxy before the embedded S3 server counts what each command asks for, in a process of its own.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import example
from benchmarks.counting_proxy import APP_ID, counting_proxy
from components.config.schema import RegistryConfig
from components.registry import aliases, versions
from components.registry.cache import CHANGED, LISTED, read_entries, write_entries
from components.report.registry_page import write_pages
from components.store.store import Store
from pipelines.local import seaweedfs
from pipelines.local.local_services import store_service

FIRST = "adapter-00000"
LEFT_OUT = ("adapter_model.safetensors", "adapter_config.json", "lineage.json")
SERVED = {"serving": {"servable_as": "lora", "notes": []}}
PAGE = """\
import sys
from components.config.schema import RegistryConfig
from components.report.registry_page import write_pages
from components.store.store import Store
write_pages(Store.open(RegistryConfig(bucket=sys.argv[1])), sys.argv[2], generated_at="now")
"""


def fill(store: Store, num_adapters: int, num_versions: int) -> None:
    """Write the registry."""
    for number in range(num_versions):
        files: dict[str, bytes] = {"adapter_model.safetensors": b"%d" % number, "adapter_config.json": b"{}"}
        version = versions.publish_version(
            store, FIRST, files, lineage={"run_id": f"run-{number}", "recipe": SERVED}
        ).version
    aliases.promote(store, FIRST, version, cause=aliases.Cause("run", "ada", "better"))
    write_pages(store, FIRST, generated_at="now")
    infos = [*store.list(f"adapters/{FIRST}/"), *store.list(f"{CHANGED}{FIRST}")]
    bodies = {info.key: store.get(info.key) for info in infos if not info.key.endswith(LEFT_OUT)}

    def copies() -> Iterator[tuple[str, bytes]]:
        for number in range(1, num_adapters):
            name = f"adapter-{number:05}"
            for key, body in bodies.items():
                yield (
                    key.replace(FIRST, name),
                    body.replace(FIRST.encode(), name.encode()) if "/events/" in key else body,
                )

    began = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        total = sum(pool.map(lambda copy: store.put(*copy) or 1, copies()))
    (entry,) = read_entries(store)[0].values()
    names = [f"adapter-{number:05}" for number in range(num_adapters)]
    write_entries(store, lambda _: {name: {**entry, "name": name} for name in names})
    print(f"{total:,} objects written in {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    """Entry point."""
    parser = example.parser("registry_requests", __doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--versions", type=int, default=50)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as home,
        store_service(Path(home)).use(bucket="many", environment=os.environ) as at,
    ):
        endpoint = seaweedfs.Endpoint.read(at)
        os.environ |= endpoint.environment()
        store = Store.open(RegistryConfig(bucket="many"))
        fill(store, options.adapters, options.versions)
        here = ["--set", "registry.bucket=many", "--json"]
        commands = {
            "adapters list": ["-m", "pipelines.cli", "adapters", "list", *here],
            "a run's pages": ["-c", PAGE, "many", FIRST],
            "a promotion": ["-m", "pipelines.cli", "adapters", "promote", FIRST, "--alias", "staging", *here],
            "adapters list, after it": ["-m", "pipelines.cli", "adapters", "list", *here],
            "adapters list NAME": ["-m", "pipelines.cli", "adapters", "list", FIRST, *here],
            "adapters show NAME": ["-m", "pipelines.cli", "adapters", "show", FIRST, *here],
            "adapters list, without its cache": ["-m", "pipelines.cli", "adapters", "list", *here],
        }
        print(f"{'command':<34} requests    MB")
        with counting_proxy(endpoint.url) as counts:
            for number, (name, command) in enumerate(commands.items()):
                if "without" in name:
                    store.delete([LISTED])
                environment = {**os.environ, "AWS_ENDPOINT_URL": counts.url, APP_ID: str(number)}
                arguments = [sys.executable, "-W", "ignore", *command]
                subprocess.run(arguments, env=environment, check=True, capture_output=True)
                asked = counts.by_process[str(number)]
                print(f"{name:<34} {asked.requests:>8} {asked.read_bytes / 1e6:>5.1f}", flush=True)


if __name__ == "__main__":
    main()
