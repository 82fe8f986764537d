"""What a model answers, and what the answers are worth."""

STEP = "evaluate"
