"""Where the registry lies, and which keys it trusts."""

import base64
from typing import Annotated

from pydantic import AfterValidator, StringConstraints, model_validator

from components.config.section import Added, Section

PRIME, OF_ORDER_8 = 2**255 - 19, 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
OF_SMALL_ORDER = {0, 1, PRIME - 1, PRIME, PRIME + 1, OF_ORDER_8, PRIME - OF_ORDER_8}
"""The y of points whose order divides 8 (RFC 8032, section 5.1)."""


def _of_a_pair(key: str) -> str:
    if int.from_bytes(base64.b64decode(key.removeprefix("ed25519:")), "little") % 2**255 in OF_SMALL_ORDER:
        raise ValueError(f"{key} is a point of small order, for which anybody can sign: name the key of a key pair")
    return key


PublicKey = Annotated[str, StringConstraints(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$"), AfterValidator(_of_a_pair)]


class RegistryConfig(Section):
    """Where the registry lies. Endpoint and credentials come from the environment (AWS_ENDPOINT_URL and so on)."""

    bucket: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] = "fineloop"
    """S3 bucket: 3 to 63 lower-case letters, digits, '.' and '-'."""
    prefix: Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*)?$")] = ""
    """Folder inside the bucket, without slashes at either end; empty means the bucket itself."""
    trusted_keys: Annotated[list[PublicKey], Added("0.2.0")] = []
    """Public keys, as `fineloop adapters sign` prints them. When set, an alias moves only to versions that one of
    them has signed for it, and only signed versions that none has revoked are fetched."""
    evaluation_keys: Annotated[list[PublicKey], Added("0.2.0")] = []
    """Public keys of the step evaluate, other ones than trusted_keys. Where trusted_keys are set, the gate decides on
    evaluations that one of these has signed, and on no other."""

    @model_validator(mode="after")
    def _keys_are_apart(self) -> "RegistryConfig":
        if self.evaluation_keys and (not self.trusted_keys or set(self.evaluation_keys) & set(self.trusted_keys)):
            raise ValueError("evaluation_keys go with trusted_keys, and no key is in both: evaluating signs no version")
        return self
