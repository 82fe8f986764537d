"""What makes one machine look like the cluster: S3, Ray and Kubeflow, all embedded."""
