"""The most memory that this process has held."""

import resource


def peak_mb(*, gpu: bool = False) -> float:
    """In MiB: resident, or on a GPU what PyTorch has reserved there."""
    if not gpu:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    import torch

    return torch.cuda.max_memory_reserved() / 2**20
