output "role_arns" {
  description = "For the annotation eks.amazonaws.com/role-arn of each service account."
  value = {
    fineloop-pipeline    = aws_iam_role.pipeline.arn
    fineloop-evaluator   = aws_iam_role.evaluator.arn
    fineloop-trainer     = aws_iam_role.trainer.arn
    fineloop-experiments = aws_iam_role.trainer.arn
  }
}

output "admin_role_arn" {
  description = "For people: aws sts assume-role, or role_arn of a profile."
  value       = aws_iam_role.admin.arn
}

output "environment" {
  description = "For the ConfigMap fineloop-env."
  value = {
    AWS_REGION         = var.region
    AWS_DEFAULT_REGION = var.region
    FINELOOP_BUCKET    = aws_s3_bucket.registry.id
  }
}
