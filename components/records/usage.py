"""What a training used."""

from components.records.part import Part


class Usage(Part):
    """Of the job that took the last step, unless it says otherwise; None where it was not known."""

    workers: int
    """At the last step."""
    gpu: str
    """Model of each worker's; empty where they had none."""
    held_s: float
    """Summed over the workers, from when the job began to the last step."""
    in_steps_s: float
    """Of the whole training summed over the workers, without steps that were lost."""
    tokens: int
    restarts: int
    """Of the whole training, as `steps_repeated`: how often workers began again after steps had been taken."""
    steps_repeated: int
    """Of those that were recorded, which happens every few seconds."""
    flops: float | None
    """Operations forward and backward, recomputed ones included, by the plan's count for a token."""
    flops_with_parents: float | None
    """With those of the versions that the training went on from."""
    s3_requests: int
    """Of the workers that took the last step, as the bytes; what the driver asks is not among them."""
    s3_read_bytes: int
    s3_written_bytes: int
    price: float | None
    """US dollars for `held_s`; None without GPUs, and of those that have no price."""
    price_source: str

    @property
    def hours(self) -> float:
        """Of one worker."""
        return self.held_s / 3600
