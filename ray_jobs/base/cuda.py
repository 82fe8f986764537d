"""Whether the installed PyTorch has kernels for this GPU.

PyTorch's wheels hold compiled kernels for some architectures, and PTX code that the driver compiles for newer ones
(docs.nvidia.com/cuda/blackwell-compatibility-guide); wheels for CUDA 13 support Turing and later.
"""

import re
from collections.abc import Sequence

from components.shared.errors import ConfigError

Capability = tuple[int, int]


def require_kernels() -> None:
    """Check that PyTorch can run on this process's GPU.

    Raises:
        ConfigError: PyTorch has no kernels for the GPU's architecture.
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
    """Whether a GPU can run kernels for one of these architectures, as `torch.cuda.get_arch_list` spells them.

    Compiled code (sm_) runs on the same and later minor versions of one major version, PTX code (compute_) on all later
    versions. A trailing letter, as in sm_90a, restricts it to that architecture.
    """
    for kind, major, minor, alone in re.findall(r"(sm|compute)_(\d+)(\d)([a-z]?)", " ".join(architectures)):
        built = int(major), int(minor)
        if built == capability or (
            not alone and built < capability and (kind == "compute" or built[0] == capability[0])
        ):
            return True
    return False
