"""What Kubeflow Pipelines runs: the same pipeline, compiled."""
