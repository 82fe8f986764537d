variable "bucket" {
  description = "Name of the bucket to create: registry.bucket of the configs."
  type        = string

  validation {
    # AWS's certificates do not cover buckets with dots; a role's name, which is the bucket's and a suffix, has 64 characters at most.
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,53}[a-z0-9]$", var.bucket))
    error_message = "bucket takes 3 to 55 lower-case letters, digits and '-', with a letter or digit at either end."
  }
}

variable "prefix" {
  description = "Folder inside the bucket, without slashes at either end: registry.prefix of the configs. Empty means the bucket itself."
  type        = string
  default     = ""

  validation {
    condition     = can(regex("^([A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*)?$", var.prefix))
    error_message = "prefix takes letters, digits, '.', '_' and '-' between slashes, and no slash at either end."
  }
}

variable "region" {
  description = "Where the bucket lies; the GPUs should be there too, as traffic between regions is charged."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region is a name such as eu-central-1."
  }
}

variable "oidc_provider_arn" {
  description = "The cluster's IAM OIDC provider, which vouches for its service accounts."
  type        = string

  validation {
    condition     = can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:oidc-provider/[^*]+$", var.oidc_provider_arn))
    error_message = "oidc_provider_arn looks like arn:aws:iam::<account>:oidc-provider/oidc.eks.<region>.amazonaws.com/id/<id>."
  }
}

variable "namespace" {
  description = "Kubernetes namespace of the service accounts fineloop-pipeline, -trainer, -evaluator and -experiments."
  type        = string
  default     = "fineloop"

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.namespace))
    error_message = "namespace takes at most 63 lower-case letters, digits and '-'; a wildcard would let other namespaces in."
  }
}

variable "admin_principal_arns" {
  description = "IAM users or roles of the people who may take the role that moves aliases by hand and deletes old versions."
  type        = list(string)

  validation {
    condition = length(var.admin_principal_arns) > 0 && alltrue([
      for arn in var.admin_principal_arns : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:(user|role)/[^*]+$", arn))
    ])
    error_message = "admin_principal_arns names at least one IAM user or role, without wildcards."
  }
}

variable "source_arns" {
  description = "Objects outside the bucket that the steps may read: data.source and model.base under other s3:// addresses, as ARNs such as arn:aws:s3:::claims/2026/*. Their buckets are listed too."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for arn in var.source_arns : can(regex("^arn:aws[a-z-]*:s3:::[a-z0-9][a-z0-9.-]+/.+$", arn))])
    error_message = "source_arns are objects, such as arn:aws:s3:::claims/2026/*, and never a whole account."
  }
}

variable "kms_key_arn" {
  description = "Customer-managed key to encrypt with. Empty means keys that S3 manages (AES-256), which cost nothing."
  type        = string
  default     = ""

  validation {
    condition     = can(regex("^$|^arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/[0-9a-f-]+$", var.kms_key_arn))
    error_message = "kms_key_arn is the ARN of a key (not of an alias), or empty."
  }
}

variable "checkpoint_days" {
  description = "How long checkpoints are kept. A run that is older can no longer be resumed."
  type        = number
  default     = 14

  validation {
    condition     = var.checkpoint_days >= 3 && floor(var.checkpoint_days) == var.checkpoint_days
    error_message = "checkpoint_days is a whole number from 3, so that a run which failed before a weekend can be resumed after it."
  }
}

variable "noncurrent_days" {
  description = "How long what was overwritten or deleted can still be brought back."
  type        = number
  default     = 90

  validation {
    condition     = var.noncurrent_days >= 7 && floor(var.noncurrent_days) == var.noncurrent_days
    error_message = "noncurrent_days is a whole number from 7."
  }
}

variable "tags" {
  description = "Tags of everything that is created, such as who pays."
  type        = map(string)
  default     = {}
}
