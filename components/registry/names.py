"""How adapters, versions and aliases are named, and where what belongs to an adapter lies."""

from pydantic import TypeAdapter, ValidationError

from components.config.schema import Name
from components.shared.errors import UserError

TOKENS = "tokens"
"""In a dataset's folder, the folder of what was made of its records: folders of their own, not in its manifest."""

_NAME: TypeAdapter[str] = TypeAdapter(Name)


def adapter_key(name: str, *parts: str) -> str:
    """Key of an adapter's folder, or of something in it.

    Raises:
        UserError: the name is not one that adapter.name allows.
    """
    return "/".join(["adapters", checked_name(name, "adapter name"), *parts])


def version_key(name: str, version: str) -> str:
    """Key of a version's folder."""
    return adapter_key(name, "versions", version)


def checked_name(name: str, what: str) -> str:
    """The name itself.

    Raises:
        UserError: it holds anything but lower-case letters, digits, '.', '_' and '-', or is longer than 63 characters.
    """
    try:
        return _NAME.validate_python(name)
    except ValidationError as exc:
        raise UserError(
            f"{what} {name!r} is not allowed: at most 63 lower-case letters, digits, '.', '_' and '-', "
            "with a letter or digit at either end"
        ) from exc
