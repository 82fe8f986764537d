"""Configs that come with Fineloop, and the JSON Schema of all configs."""

from pathlib import Path

DEFAULT_CONFIG = Path(__file__).with_name("icd10.toml").resolve()
"""The built-in example."""
