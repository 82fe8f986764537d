"""Compare base, champion and candidate: the step that waits for the Ray job to do so."""
