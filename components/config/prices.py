"""What an hour of a GPU costs."""

from components.config.gpus import GPUS, PRICED
from components.config.ray import RayConfig


def price_per_hour(ray: RayConfig, gpu: str) -> tuple[float, str] | None:
    """US dollars and where they are from: the config's price, or the list's for the product that a worker names."""
    if not gpu:
        return None
    if ray.gpu_price_per_hour is not None:
        return ray.gpu_price_per_hour, "ray.gpu_price_per_hour"
    listed = next((each for each in GPUS.values() if each.product.replace("-", " ") == gpu), None)
    listed = listed or (GPUS[ray.gpu] if ray.gpu else None)
    return (listed.price_per_hour, f"{listed.price_source}, {PRICED}") if listed else None
