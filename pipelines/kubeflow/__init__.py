"""The pipeline on Kubeflow Pipelines: compiled, submitted, scheduled, followed and stopped."""
