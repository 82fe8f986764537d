"""The names of adapters, versions and aliases, and the keys of an adapter's objects."""

from pydantic import TypeAdapter, ValidationError

from components.config.schema import Name
from components.shared.errors import UserError

TOKENS = "tokens"
"""The subfolder of a dataset for what was made from its records: separate folders, which its manifest does not list."""

_NAME: TypeAdapter[str] = TypeAdapter(Name)


def adapter_key(name: str, *parts: str) -> str:
    """The key of an adapter's folder, or of something in it.

    Raises:
        UserError: the name is not one that adapter.name allows.
    """
    return "/".join(["adapters", checked_name(name, "adapter name"), *parts])


def version_key(name: str, version: str) -> str:
    """The key of a version's folder."""
    return adapter_key(name, "versions", version)


def checked_name(name: str, what: str) -> str:
    """Check a name and return it. `what` says what it names, for the error.

    Raises:
        UserError: it has anything but lower-case letters, digits, '.', '_' and '-', or is longer than 63 characters.
    """
    try:
        return _NAME.validate_python(name)
    except ValidationError as exc:
        raise UserError(
            f"{what} {name!r} is not allowed: at most 63 lower-case letters, digits, '.', '_' and '-', "
            "with a letter or digit at either end"
        ) from exc
