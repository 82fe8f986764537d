"""What a pipeline step is, whatever it does."""
