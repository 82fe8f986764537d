"""Where the registry lies, and whom it trusts."""

from typing import Annotated

from pydantic import StringConstraints

from components.config.section import Added, Section

PublicKey = Annotated[str, StringConstraints(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$")]


class RegistryConfig(Section):
    """Where the registry lies. Endpoint and credentials come from the environment (AWS_ENDPOINT_URL and so on)."""

    bucket: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] = "fineloop"
    """S3 bucket: 3 to 63 lower-case letters, digits, '.' and '-'."""
    prefix: Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*)?$")] = ""
    """Folder inside the bucket, without slashes at either end; empty means the bucket itself."""
    trusted_keys: Annotated[list[PublicKey], Added("0.2.0")] = []
    """Public keys, as `fineloop adapters sign` prints them. Where there are any, an alias moves only to a version that
    one of them has signed, and nobody fetches another."""
