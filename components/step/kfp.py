"""What every step's KFP component is made with."""

from typing import Any

IMAGE = "fineloop/step-python:0.2.0"
"""The image that every step runs in; `fineloop compile --image` puts a pinned one in its place."""
COMPONENT: dict[str, Any] = {"base_image": IMAGE, "packages_to_install": [], "install_kfp_package": False}
"""What every `dsl.component` takes: the code is in the image, so that a step installs nothing when it starts."""
