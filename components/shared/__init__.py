"""What everything shares: errors, lines that processes print, metrics, the processor, the environment."""
