"""The steps of the pipeline: a small image, without torch."""
