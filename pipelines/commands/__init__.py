"""The commands of `fineloop`, one file per group."""
