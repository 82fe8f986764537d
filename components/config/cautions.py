"""Cautions about settings that are allowed and hardly ever meant: shown before a training, never an error."""

from collections.abc import Iterator

from components.config.schema import RunConfig

FAR = 30.0
"""A setting this many times above or below the method's own value gets a caution: VeRA's rate is 30 times LoRA's."""
MOST_DECAY = 1.0
"""The largest train.weight_decay without a caution; publications use 0.1 and less."""
LEAST_NORM = 0.03
"""The smallest train.max_grad_norm without a caution; 1 is usual."""
MOST_SHARE = 0.5
"""The largest method.dropout, and train.warmup_share, without a caution."""
FEW_STEPS = 20


def cautions(config: RunConfig, num_steps: int | None = None) -> Iterator[str]:
    """Yield one line per caution. `num_steps` is the training's number of optimizer steps; None where it is unknown."""
    method, train, name = config.method, config.train, config.method.name
    for field, value, usual in (
        ("train.learning_rate", config.learning_rate, method.row.learning_rate),
        ("method.alpha", method.lora_alpha, method.row.alpha(method.r)),
    ):
        if field == "method.alpha" and not method.row.has_alpha:
            continue
        if not usual / FAR <= value <= usual * FAR:
            how = f"{value / usual:.3g} times" if value > usual else f"a {usual / value:.3g}th of"
            yield f"{field} {value:g} is {how} the {usual:g} of {name} at rank {method.r}"
    for field, value, bound, is_above in (
        ("train.weight_decay", train.weight_decay, MOST_DECAY, True),
        ("train.max_grad_norm", train.max_grad_norm, LEAST_NORM, False),
        ("method.dropout", method.dropout, MOST_SHARE, True),
        ("train.warmup_share", train.warmup_share, MOST_SHARE, True),
    ):
        if value > bound if is_above else value < bound:
            yield f"{field} {value:g} is {'above' if is_above else 'below'} {bound:g}, which is hardly ever right"
    if num_steps is not None and num_steps < FEW_STEPS:
        yield (
            f"{num_steps} optimizer steps are few: raise train.epochs, lower train.batch_size (now {train.batch_size}) "
            "and train.micro_batch_size, or add data"
        )
