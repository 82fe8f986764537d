"""Pushes a folder of weights to the Hugging Face hub, or to a compatible hub (HF_ENDPOINT)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from components.shared.errors import FineloopError, UserError

TOKEN = "HF_TOKEN"
HARMLESS = (".safetensors", ".json", ".md", ".jinja", ".txt", ".model", "LICENSE", "LICENCE", "NOTICE")
"""Endings of the files that may be pushed: nothing that runs where it is loaded."""


def push(
    folder: Path, repository: str, *, message: str, tag: str, is_public: bool, environment: Mapping[str, str]
) -> str:
    """Commit the folder's files to a model repository, tag the commit, and return its URL.

    A repository that does not exist is created, private unless `is_public`. A tag that exists is left as it is.

    Raises:
        UserError: the hub does not take the name, token or files; or the repository has the tag already, or is public
            without `is_public`.
        FineloopError: the hub cannot be reached, or fails.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository, re.ASCII):
        raise UserError(f"{repository!r} is no repository: expected ORG/NAME")
    if not environment.get(TOKEN):
        raise UserError(f"{TOKEN} is not set: put a token that may write to {repository} into the environment")
    _require_harmless(folder)
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import BadRequestError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    except ImportError as exc:
        raise UserError("huggingface_hub is not installed here: pip install 'fineloop[hub]'") from exc
    hub = HfApi(token=environment[TOKEN])
    (no_answer,) = (kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")  # from httpx or its heir
    try:
        hub.create_repo(repository, private=not is_public, exist_ok=True)
        if not is_public and not hub.model_info(repository).private:
            raise UserError(f"{repository} is public: say --public, or take another repository")
        if any(ref.name == tag for ref in hub.list_repo_refs(repository).tags):
            raise UserError(f"{repository} has {tag} already: take another repository, or delete that tag there")
        done = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        hub.create_tag(repository, tag=tag, revision=done.oid)
        return str(done.commit_url)
    except (HFValidationError, BadRequestError) as exc:
        raise UserError(f"the hub does not take {repository}: {_first_line(exc)}") from exc
    except OfflineModeIsEnabled as exc:
        raise UserError("HF_HUB_OFFLINE is set, and a push needs the hub: unset it") from exc
    except HfHubHTTPError as exc:
        why = f"{repository} ({exc.response.status_code}): {_first_line(exc)}"
        if exc.response.status_code in (401, 403, 404):
            raise UserError(f"the hub refuses {why}; {TOKEN} must be a token that may write there") from exc
        raise FineloopError(f"the hub fails at {why}") from exc
    except no_answer as exc:
        raise FineloopError(f"the hub at {hub.endpoint} cannot be reached ({_first_line(exc)}): try again") from exc
    except ValueError as exc:  # raised by the library for an invalid card
        raise UserError(f"the hub does not take README.md: {' '.join(str(exc).split())}") from exc
    except RuntimeError as exc:  # raised by an upload that had begun
        raise FineloopError(f"{_first_line(exc)} {exc.__cause__ or ''}: push again, which goes on with it") from exc


def name_base(folder: Path, repository: str) -> None:
    """Name the hub's copy of the base in an adapter's config and card. manifest.json goes, as it is of other bytes."""
    config, card = folder / "adapter_config.json", folder / "README.md"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "base_model_name_or_path": repository}, indent=2), encoding="utf-8")
    text = re.sub(r"(?m)^base_model: .*", f"base_model: {repository}", card.read_text(encoding="utf-8"), count=1)
    card.write_text(text, encoding="utf-8")
    (folder / "manifest.json").unlink()


def _require_harmless(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    if any(path.suffix == ".gguf" for path in files):
        raise UserError(f"{folder} holds a GGUF, and weights go as safetensors alone: push what --merged writes")
    if not any(path.suffix == ".safetensors" for path in files):
        raise UserError(f"{folder} holds no safetensors: name a folder of `fineloop adapters export`")
    if other := sorted(path.name for path in files if not path.name.endswith(HARMLESS)):
        raise UserError(f"{folder} holds {other[0]}: weights go as safetensors alone, and nothing that runs")
    if not (config := folder / "adapter_config.json").is_file():
        return
    base = str(json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    if base and not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", base, re.ASCII):
        raise UserError(
            f"the adapter was trained on {base}, which nobody else can load: push what `fineloop adapters export "
            "--merged` writes, with --from; or what `adapters pull --with-base` does, and name it with --base"
        )


def _first_line(exc: Exception) -> str:
    return next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
