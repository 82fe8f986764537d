"""Ray clusters: a job on one that exists, or on one that KubeRay makes for it."""
