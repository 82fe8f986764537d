"""Building, and later merging, the adapters of the LoRA family."""
