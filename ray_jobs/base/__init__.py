"""The frozen base: from a reference to a model in memory, its batches, its loss and its products."""
