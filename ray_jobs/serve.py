"""Try an adapter over HTTP on this machine: `fineloop serve NAME`. Not a production server."""

import asyncio
import contextlib
from typing import TYPE_CHECKING

from components.config.schema import RunConfig
from components.registry.versions import resolve
from components.shared import garbage
from components.store.store import Store
from ray_jobs import entry

if TYPE_CHECKING:
    from ray_jobs.talking.server import Server


def main() -> None:
    """The entry point. Serves until it is interrupted."""
    parser = entry.parser("ray_jobs.serve", __doc__)
    parser.add_argument("--version", required=True, help="NAME, NAME@ALIAS or NAME@VERSION")
    parser.add_argument("--against", default="base", choices=("base", "none"), help="what answers beside it")
    parser.add_argument("--port", type=int, default=0, help="0 takes any that is free")
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt), entry.for_people():
        config = entry.load_config(arguments.config, arguments.set)
        server = opened(config, arguments.version, arguments.port, with_base=arguments.against == "base")
        entry.print_err(f"serving {', '.join(server.speakers)} at {server.url}/v1, its API key {server.token}")
        entry.print_err(f"and a page at {server.url}/?token={server.token}")
        entry.print_err("for trying out on this machine, no production server: Ctrl-C ends it")
        asyncio.run(server.serve())


def opened(config: RunConfig, reference: str, port: int, *, with_base: bool) -> "Server":
    """The server with its models loaded, listening but not yet answering; raises UserError where the port is taken."""
    with garbage.importing():
        from ray_jobs.talking import speaker
        from ray_jobs.talking.server import Server

    store = Store.open(config.registry)
    version = resolve(store, reference)
    name = f"{version.name}@{version.version}"
    speakers = speaker.load(config, store, version, name, with_base=with_base)
    trained = speaker.as_trained(config, store, version)
    about = {"models": [model.name for model in speakers], "system": trained.system, "keeps_turns": trained.in_turns}
    return Server(port, {model.name: model for model in speakers}, about)


if __name__ == "__main__":
    main()
