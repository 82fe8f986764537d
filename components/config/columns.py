"""The config's words on which column of a row is which."""

from components.config.section import Section


class ColumnsConfig(Section):
    """Columns of your rows that have names of their own. Unset, rows are known by their columns: see data.md."""

    prompt: str | list[str] = ""
    """Column of the prompt, or a list of columns whose texts are joined by a blank line; in a list, empty columns are
    skipped."""
    completion: str = ""
    """Column of the answer."""
    messages: str = ""
    """Column of a conversation, a list of {role, content} or of {from, value}."""
    system: str = ""
    """Column of a system message, which goes before the prompt or the conversation."""
    id: str = ""
    """Column of the record's id."""
    tools: str = ""
    """Column of the tools that may be called."""
