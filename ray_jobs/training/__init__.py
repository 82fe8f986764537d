"""One training: its worker, its loop, its checkpoints, and DeepSpeed as it is used here."""

STEP = "finetune"
