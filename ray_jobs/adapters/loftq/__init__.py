"""LoftQ: NF4 weights and a starting adapter, chosen together (arXiv:2310.08659)."""
