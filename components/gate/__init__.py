"""The gate: decides whether a candidate may take the alias."""
