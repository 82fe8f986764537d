"""What a page may run, as its Content-Security-Policy says it."""

import base64
import hashlib


def script_source(script: str) -> str:
    """The source that allows exactly this inline script, and no other that came into the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
