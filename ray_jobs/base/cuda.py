"""Whether the installed PyTorch can compute on a GPU at all.

Its wheels hold compiled kernels for some architectures, and code that a driver compiles for newer ones
(docs.nvidia.com/cuda/blackwell-compatibility-guide): those of CUDA 13 begin with Turing.
"""

import re
from collections.abc import Sequence

from components.shared.errors import ConfigError

Capability = tuple[int, int]


def require_kernels() -> None:
    """Refuse this process's GPU where PyTorch has nothing to run on it.

    Raises:
        ConfigError: it has no kernels for its architecture.
    """
    import torch

    capability, architectures = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if not has_kernels(capability, architectures):
        raise ConfigError(
            f"{torch.cuda.get_device_name()} has compute capability {'.'.join(map(str, capability))}, and torch "
            f"{torch.__version__} is built for {', '.join(architectures)}: take a newer ray.gpu, or an image whose "
            "torch is built for it"
        )


def has_kernels(capability: Capability, architectures: Sequence[str]) -> bool:
    """Whether a GPU runs one of these, as `torch.cuda.get_arch_list` spells them.

    Compiled code, sm_, runs on its own and later minor versions of one major version; code that the driver compiles,
    compute_, on all later ones. A letter at the end, as in sm_90a, means that architecture alone.
    """
    for kind, major, minor, alone in re.findall(r"(sm|compute)_(\d+)(\d)([a-z]?)", " ".join(architectures)):
        built = int(major), int(minor)
        if built == capability or (
            not alone and built < capability and (kind == "compute" or built[0] == capability[0])
        ):
            return True
    return False
