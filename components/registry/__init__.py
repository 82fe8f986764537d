"""The adapter registry on S3: folders with manifests, versions, aliases, lineage."""
