"""What runs, in what order: the pipelines and the command line."""
