"""What everything shares: the errors, the lines that processes print, the metrics, the processor."""
