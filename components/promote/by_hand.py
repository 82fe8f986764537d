"""A promotion that a person asks for."""

from typing import TYPE_CHECKING

from components.registry import aliases, versions

if TYPE_CHECKING:
    from components.registry.aliases import Event
    from components.registry.store import Store


def promote_by_hand(
    store: "Store",
    reference: str,
    *,
    alias: str = aliases.PRODUCTION,
    expected: str | None = aliases.ANYONE,
    actor: str = "",
    reason: str = "",
) -> "Event":
    """Point the alias at the version that the reference means, whatever the gate said.

    The event is "overridden" when a gate refused the version for this alias, else "promoted".

    Raises:
        UserError: the reference is malformed or ambiguous.
        ObjectMissing: there is no such version.
        AliasConflict: the alias is not at `expected`, or moved meanwhile.
    """
    version = versions.resolve(store, reference)
    refused = any(
        event.kind == "refused" and event.body.get("version") == version.version and event.body.get("alias") == alias
        for event in aliases.events(store, version.name)
    )
    return aliases.promote(
        store,
        version.name,
        version.version,
        alias,
        expected=expected,
        kind="overridden" if refused else "promoted",
        run_id=version.run_id,
        actor=actor,
        reason=reason,
    )
