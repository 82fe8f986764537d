"""What a training cost: the time that its workers were held, how much of it went into steps, and the price of that."""

from components.config import config_file
from components.config.gpus import GPUS, PRICED
from components.report.numbers import count, parse_moment
from components.report.run_files import RunFiles


def cost(run: RunFiles) -> str:
    """In one line; empty where the run does not say how long it trained, and with what.

    Workers are held from the start of the job to the last step. What is not in steps are starts and checks. Of a run
    that went on from a checkpoint an earlier job may have taken some steps, so that shares would compare two jobs.
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
    return text + _price(run, str(hardware.get("gpu", "")), hours)


def _price(run: RunFiles, gpu: str, hours: float) -> str:
    """Of GPUs: at the config's price, or the list's for the product that the workers named."""
    ray = config_file.loads(run.config_toml).ray if run.config_toml and gpu else None
    if ray is None:
        return ""
    if ray.gpu_price_per_hour is not None:
        return f"; ${hours * ray.gpu_price_per_hour:,.2f} at ray.gpu_price_per_hour"
    listed = next((each for each in GPUS.values() if each.product.replace("-", " ") == gpu), None)
    listed = listed or (GPUS[ray.gpu] if ray.gpu else None)
    if listed is None:
        return ""
    return f"; ${hours * listed.price_per_hour:,.2f} at ${listed.price_per_hour:g} ({listed.price_source}, {PRICED})"
