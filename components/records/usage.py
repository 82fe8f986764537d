"""Resources that a training used."""

from components.records.part import Part


class Usage(Part):
    """Resources used by the job that took the last step, unless a field says otherwise; None means unknown."""

    workers: int
    """Number of workers at the last step."""
    gpu: str
    """GPU model of each worker; empty if they had no GPU."""
    held_s: float
    """Seconds from the start of the job to the last step, summed over the workers."""
    in_steps_s: float
    """Seconds spent in the whole training's steps, summed over the workers, without steps that were lost."""
    tokens: int
    restarts: int
    """How often workers restarted after steps had been taken; like `steps_repeated`, over the whole training."""
    steps_repeated: int
    """Number of steps taken again after restarts. Only recorded steps count; they are recorded every few seconds."""
    flops: float | None
    """Operations of forward and backward passes, including recomputed ones, by the plan's count per token."""
    flops_with_parents: float | None
    """`flops` plus the operations of the versions that the training went on from."""
    s3_requests: int
    """S3 requests of the workers that took the last step, without the driver's; the same holds for the bytes below."""
    s3_read_bytes: int
    s3_written_bytes: int
    price: float | None
    """US dollars for `held_s`; None without GPUs, or if the GPUs have no price."""
    price_source: str

    @property
    def hours(self) -> float:
        """Worker-hours: `held_s` in hours."""
        return self.held_s / 3600
