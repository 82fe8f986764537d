"""Compare base, champion and candidate: the step that submits the evaluation job to Ray."""
