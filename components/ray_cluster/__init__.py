"""The way to Ray: a job on a cluster that exists, or on one that KubeRay makes for it."""
