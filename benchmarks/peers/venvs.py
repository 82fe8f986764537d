"""Each peer's environment: a venv of its own, with the versions that requirements/ pins.

They lie in $FINELOOP_PEERS, or in ~/.cache/fineloop/peers, some 900 to 1,900 MB each, and are used again until what is
pinned changes. Packages come from PyPI by pip, and torch is the plain one, the same release as ours.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

PINNED = Path(__file__).with_name("requirements")
PEERS = ("trainer", "trl", "llamafactory", "axolotl", "unsloth")
ALONE = {"axolotl": ("axolotl==0.19.0",)}
"""Without what they depend on: Axolotl wants packages that need CUDA, and servers' clients by the dozen."""


class NotInstalledError(Exception):
    """A peer's packages could not be installed; the message is pip's."""


def folder() -> Path:
    """Where environments are kept."""
    return Path(os.environ.get("FINELOOP_PEERS") or Path.home() / ".cache" / "fineloop" / "peers")


def python(peer: str, pinned: Path = PINNED) -> Path:
    """The interpreter of a peer's environment, which is made first where it is not there or what is pinned changed.

    Raises:
        NotInstalledError: pip failed. What it left is taken up by the next try.
    """
    made, alone = folder() / peer, ALONE.get(peer, ())
    interpreter, ready = made / "bin" / "python", made / "ready"
    packages = pinned / f"{peer}.txt"
    wanted = hashlib.sha256(packages.read_bytes() + repr(alone).encode()).hexdigest()
    if ready.is_file() and ready.read_text(encoding="utf-8").strip() == wanted and interpreter.exists():
        return interpreter
    print(f"installing {peer} into {made}", flush=True)
    if not interpreter.exists():
        shutil.rmtree(made, ignore_errors=True)
        venv.create(made, with_pip=False, symlinks=True)
    _pip(peer, interpreter, ["--requirement", str(packages)])
    if alone:
        _pip(peer, interpreter, ["--no-deps", *alone])
    ready.write_text(wanted + "\n", encoding="utf-8")
    return interpreter


def _pip(peer: str, interpreter: Path, packages: list[str]) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet"]
    done = subprocess.run([*pip, "--disable-pip-version-check", *packages], capture_output=True, text=True)
    if done.returncode:
        raise NotInstalledError(f"{peer}: pip: {done.stderr.strip()[-800:]}")
