"""The commands of `fineloop`: a file per command, or per group of commands, that bears its name."""
