"""The frozen base: from a reference to files, and from files to a model in memory."""
