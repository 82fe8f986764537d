"""The registry, opened for one command."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from components.shared.environment import in_environment
from components.shared.errors import UserError
from pipelines.commands.arguments import load_config

if TYPE_CHECKING:
    from components.store.store import Store


@contextlib.contextmanager
def opened_registry(options: argparse.Namespace) -> Iterator["Store"]:
    """Open the registry that the config names, in the configured store or in the home's own.

    Raises:
        UserError: the home has no store, and none is configured.
        GroundError: the home's store does not start.
    """
    from components.store.store import Store
    from pipelines.local.local_services import local_services, store_configured

    config = load_config(options)
    if not store_configured() and not (options.home / "store").is_dir():
        raise UserError(
            f"there is no store under {options.home}: give the --home of an earlier `fineloop run`, or set "
            "AWS_ENDPOINT_URL to where your registry lies"
        )
    services = local_services(options.home, bucket=config.registry.bucket, ray=False)
    with services as environment, in_environment(environment):
        yield Store.open(config.registry)
