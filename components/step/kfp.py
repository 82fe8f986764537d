"""The image and the arguments of every step's KFP component."""

from typing import Any

IMAGE = "fineloop/step-python:0.2.0"
"""The image that every step runs in; `fineloop compile --image` replaces it with a pinned one."""
COMPONENT: dict[str, Any] = {"base_image": IMAGE, "packages_to_install": [], "install_kfp_package": False}
"""The arguments of every `dsl.component`. The code is in the image, so that a step installs nothing when it starts."""
