"""The parts of a page's Content-Security-Policy that say what it may run."""

import base64
import hashlib


def script_source(script: str) -> str:
    """The source that allows exactly this inline script, and no other that gets into the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
