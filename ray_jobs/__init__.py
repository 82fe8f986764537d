"""GPU work, run inside the Ray cluster."""
