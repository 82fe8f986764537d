"""`fineloop sweep`: runs a sweep on this machine, describes its result, and writes it to a config."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import config_file
from components.config.methods import setting
from components.config.schema import RunConfig
from components.records import runs
from components.records.sweep import SweepResult, Tuned
from components.report.forest import picture
from components.shared.durations import counted
from components.shared.errors import ConfigError
from pipelines.local.run import Place, run_and_read

if TYPE_CHECKING:
    from components.store.store import Store

BAR = 24  # length of the longest bar, in characters


def sweep(config: RunConfig, place: Place, *, run_id: str = "") -> SweepResult:
    """Run a sweep to its end, or resume the sweep with this id where it was interrupted.

    Raises:
        FineloopError: as `run_and_read`.
    """
    sweeping = config.model_copy(update={"tune": config.tune.model_copy(update={"when": "always"})})

    def read(store: "Store", run_id: str, folder: Path, ground_s: float, total_s: float) -> SweepResult:
        result = runs.read(store, run_id, SweepResult)
        (folder / runs.SWEEP).write_bytes(result.as_json())
        picture_path(place, run_id).write_text(picture(result), encoding="utf-8")
        return result

    return run_and_read(sweeping, place, read, what="sweep", run_id=run_id)


def picture_path(place: Place, run_id: str) -> Path:
    """Return the path of a sweep's picture on this machine."""
    return place.home.absolute() / "runs" / run_id / "sweep.svg"


def sweep_lines(result: SweepResult) -> Iterator[str]:
    """Yield the result as lines of text."""
    for tuned in result.tuned:
        yield f"{tuned.method}, rank {tuned.rank}, {counted(tuned.batch_size, 'record')} a step"
        yield from _rate_lines(tuned)
        yield ""
    yield result.verdict


def _rate_lines(tuned: Tuned) -> Iterator[str]:
    known = [rate.loss for rate in tuned.rates if rate.loss is not None]
    least, span = min(known), (max(known) - min(known)) or 1.0
    for rate in tuned.rates:
        mark = "*" if rate.learning_rate == tuned.learning_rate else " "
        if rate.loss is None:
            yield f"  {mark} {rate.learning_rate:>8.3g}         -  {', '.join(sorted(set(rate.statuses)))}"
            continue
        bar = "#" * max(1, round(BAR * (rate.loss - least) / span))
        stopped = "  stopped early" if "stopped" in rate.statuses else ""
        yield f"  {mark} {rate.learning_rate:>8.3g}  {rate.loss:8.4f}  {bar}{stopped}"


def changes(config: RunConfig, best: Tuned) -> dict[str, str | int | float]:
    """Return the keys to change so that a config trains as the best of a sweep did, with their values."""
    found: dict[str, str | int | float] = {}
    if best.method != config.method.name:
        found["method.name"] = best.method
    if best.rank != config.method.model_copy(update={"name": best.method}).r:
        found["method.rank"] = best.rank
    if best.batch_size != config.train.batch_size:
        found["train.batch_size"] = best.batch_size
    if best.learning_rate != config.train.learning_rate:
        found["train.learning_rate"] = best.learning_rate
    return found


def apply(path: Path, config: RunConfig, best: Tuned) -> dict[str, str | int | float]:
    """Write the sweep's result to a config file, leaving the rest of its text as it is; return the keys that changed.

    Raises:
        ConfigError: the changed file could not be read, or would not have the learning rate that was found.
    """
    found = changes(config, best)
    text = path.read_text(encoding="utf-8")
    for key, value in found.items():
        text = with_key(text, key, value)
    try:
        written = config_file.loads(text, origin=str(path))
    except ConfigError as exc:
        raise ConfigError(f"--apply would spoil {path}, which is left as it is; set {_settings(found)}: {exc}") from exc
    if written.learning_rate != best.learning_rate:
        raise ConfigError(f"--apply does not find its way in {path}, which is left as it is: set {_settings(found)}")
    path.write_text(text, encoding="utf-8")
    return found


def with_key(text: str, key: str, value: str | int | float) -> str:
    """Set one key of a section in TOML text: in the key's line if it has one, else as the section's first key."""
    section, _, name = key.partition(".")
    line = f"{name} = " + (f'"{value}"' if isinstance(value, str) else f"{value:g}")
    head = re.search(rf"^\[{re.escape(section)}\][ \t]*(#.*)?$", text, flags=re.MULTILINE)
    if head is None:
        return f"{text.rstrip()}\n\n[{section}]\n{line}\n"
    following = re.compile(r"^\[", flags=re.MULTILINE).search(text, head.end())
    end = following.start() if following else len(text)
    body = text[head.end() : end]
    held, count = re.subn(
        rf"^{name}[ \t]*=[^#\n]*?([ \t]*#.*)?$", lambda found: line + (found[1] or ""), body, flags=re.MULTILINE
    )
    return text[: head.end()] + (held if count else f"\n{line}{body}") + text[end:]


def _settings(found: dict[str, str | int | float]) -> str:
    return " ".join(setting(key, value) for key, value in found.items())
