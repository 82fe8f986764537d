"""The command line as a process."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from components.config import config_file
from components.registry.aliases import read_alias
from components.registry.versions import Version, publish_version
from components.store.store import Store
from docs.json_keys import FREE, JSON_KEYS
from tests.models.tiny import build_base
from tests.models.tiny_version import publish

ROOT = Path(__file__).resolve().parents[2]


def begun(*arguments: str | Path, cwd: Path, **environment: str) -> Popen[bytes]:
    """The command as a process in a session of its own, that goes on beside the test; no kubeconfig is there."""
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KUBECONFIG": "/nowhere", **environment}
    return Popen(command, cwd=cwd, env=env, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True)


def fineloop(*arguments: str | Path, cwd: Path, typed: str = "", **environment: str) -> CompletedProcess[str]:
    with begun(*arguments, cwd=cwd, **environment) as process:
        out, err = process.communicate(typed.encode())
    return CompletedProcess(process.args, process.returncode, out.decode(), err.decode())


def body(done: CompletedProcess[str]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    require_documented(done.args[done.args.index("pipelines.cli") + 1 :], loaded)
    return loaded


def require_documented(arguments: Sequence[str], printed: dict[str, Any]) -> None:
    """docs/cli.md names the keys that a command prints with --json."""
    command = next(name for name in (" ".join(arguments[:2]), arguments[0]) if name in {*JSON_KEYS, *FREE})
    if "error" not in printed and command not in FREE:
        assert set(printed) <= set(JSON_KEYS[command].split())


def sums(first: int, end: int) -> str:
    """Lines of JSON: what each of these numbers and one are together."""
    rows = [{"id": f"{n}", "prompt": f"How much is {n} + 1?", "completion": f"{n + 1}"} for n in range(first, end)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def pem(key: Ed25519PrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def production(store: Store) -> str | None:
    """The version of sums that is in production."""
    pointer = read_alias(store, "sums", "production")
    return pointer.version if pointer else None


def publish_sums(store: Store, weights: str, **lineage: Any) -> str:
    """A version of the adapter sums that no training made."""
    files = {"adapter_model.safetensors": weights.encode(), "adapter_config.json": b"{}"}
    return publish_version(store, "sums", files, lineage=lineage).version


def colours(store: Store, folder: Path, method: str, more: str = "") -> Version:
    """A real version of the tiny base; where.toml, in the folder, says where its registry lies."""
    (folder / "where.toml").write_text(
        f'[adapter]\nname = "colours"\n[data]\nsource = "none.jsonl"\n[method]\nname = "{method}"\nrank = 8\n'
        f'[model]\nbase = "{build_base(folder / "base")}"\nmax_length = 64\n'
        f'[registry]\nbucket = "{store.bucket}"\nprefix = "{store.prefix}"\n{more}'
    )
    return publish(config_file.load(folder / "where.toml"), store, folder)
