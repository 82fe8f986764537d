"""What servers of adapters are given: how a version can be served, manifests, and versions by name for vLLM."""
