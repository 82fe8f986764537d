"""Tasks of lm-eval that come with Fineloop."""
