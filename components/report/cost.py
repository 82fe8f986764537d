"""What a training cost: the time that its workers were held, how much of it went into steps, and the price of that."""

from typing import Any

from components.config import config_file
from components.config.prices import price_per_hour
from components.records.usage import Usage
from components.report.numbers import count, parse_moment
from components.report.run_files import RunFiles
from components.shared.counted import counted

MB = 10**6


def cost(run: RunFiles) -> str:
    """Return the cost of a training in one line; empty if the run does not record its duration and hardware.

    Workers are held from the start of the job to the last step; time outside steps goes into startup and checks. If a
    run resumed from a checkpoint, an earlier job may have taken some steps, so that shares would compare two jobs.
    """
    step = run.step("finetune")
    result = step.result if step else {}
    hardware = (run.lineage or {}).get("hardware") or {}
    began, ended = parse_moment(result.get("began_at")), parse_moment(result.get("trained_at"))
    workers, seconds, tokens = hardware.get("workers"), result.get("train_seconds"), result.get("tokens")
    if not (began and ended and workers and seconds and tokens):
        return ""
    held_s = (ended - began).total_seconds()
    hours = workers * held_s / 3600
    unit = "GPU-hour" if hardware.get("gpu") else "worker-hour"
    if result.get("resumed_from_step"):
        text = f"{hours:.2f} {unit}s of the job that took the last step"
    else:
        text = f"{hours:.2f} {unit}s until the last step, {seconds / held_s:.0%} of them in steps"
        text += f"; {count(round(tokens / hours))} tokens a {unit}"
    return text + _used(result.get("usage")) + _price(run, str(hardware.get("gpu", "")), hours)


def _used(recorded: Any) -> str:
    """Return the recorded usage as text; empty if an earlier release recorded none."""
    if not recorded:
        return ""
    used = Usage.model_validate(recorded)
    parts = []
    if used.restarts:
        parts.append(f"{counted(used.restarts, 'restart')}, {counted(used.steps_repeated, 'step')} taken twice")
    if used.flops is not None:
        before = used.flops_with_parents != used.flops and used.flops_with_parents
        parts.append(f"{used.flops:.2g} FLOPs{f', {before:.2g} with what it went on from' if before else ''}")
    parts.append(
        f"{counted(used.s3_requests, 'S3 request')} of the workers, "
        f"{used.s3_read_bytes / MB:,.1f} MB read, {used.s3_written_bytes / MB:,.1f} MB written"
    )
    return "".join(f"; {part}" for part in parts)


def _price(run: RunFiles, gpu: str, hours: float) -> str:
    """Return the price of the GPU hours as text, by the config's price or the list price for the workers' GPU model."""
    found = price_per_hour(config_file.loads(run.config_toml).ray, gpu) if run.config_toml else None
    if found is None:
        return ""
    price, source = found
    return f"; ${hours * price:,.2f} at " + (f"${price:g} ({source})" if " " in source else source)
