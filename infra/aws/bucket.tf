locals {
  # What every key begins with, and the same as an ARN that a pattern can follow.
  keys = var.prefix == "" ? "" : "${var.prefix}/"
  root = "${aws_s3_bucket.registry.arn}/${local.keys}"
}

resource "aws_s3_bucket" "registry" {
  bucket = var.bucket

  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_s3_bucket_versioning" "registry" {
  bucket = aws_s3_bucket.registry.id

  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "registry" {
  bucket = aws_s3_bucket.registry.id

  rule {
    # One data key for many objects: KMS is asked, and paid, far less often.
    bucket_key_enabled = true

    apply_server_side_encryption_by_default {
      sse_algorithm     = var.kms_key_arn != "" ? "aws:kms" : "AES256"
      kms_master_key_id = var.kms_key_arn != "" ? var.kms_key_arn : null
    }
  }
}

resource "aws_s3_bucket_public_access_block" "registry" {
  bucket = aws_s3_bucket.registry.id

  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

# Access is by policy alone: access control lists are off.
resource "aws_s3_bucket_ownership_controls" "registry" {
  bucket = aws_s3_bucket.registry.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "registry" {
  bucket = aws_s3_bucket.registry.id

  # A filter knows prefixes and sizes, no wildcards, and checkpoints lie in runs/<id>/checkpoints/. Nothing else in a run's
  # folder is this large: reports, decisions, evaluated records and the notes of consumed objects stay.
  rule {
    id     = "checkpoints"
    status = "Enabled"

    filter {
      and {
        prefix                   = "${local.keys}runs/"
        object_size_greater_than = 67108864
      }
    }

    expiration {
      days = var.checkpoint_days
    }
  }

  # Left by `fineloop doctor` when it is interrupted.
  rule {
    id     = "probes"
    status = "Enabled"

    filter {
      prefix = "${local.keys}.check/"
    }

    expiration {
      days = 1
    }
  }

  rule {
    id     = "overwritten-and-deleted"
    status = "Enabled"

    filter {}

    noncurrent_version_expiration {
      noncurrent_days = var.noncurrent_days
    }

    expiration {
      expired_object_delete_marker = true
    }
  }

  rule {
    id     = "unfinished-uploads"
    status = "Enabled"

    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = 3
    }
  }

  depends_on = [aws_s3_bucket_versioning.registry]
}

# What no role may do, whoever grants it. The condition keys are those of "Enforce conditional writes on Amazon S3 buckets"
# in the S3 user guide; s3:ObjectCreationOperation exempts the parts of an upload, whose completion is what is judged.
data "aws_iam_policy_document" "bucket" {
  statement {
    sid       = "EncryptedConnectionsOnly"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [aws_s3_bucket.registry.arn, "${aws_s3_bucket.registry.arn}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }

  # Two runs that decide at the same time must not both take an alias.
  statement {
    sid       = "PointersMoveByCompareAndSwap"
    effect    = "Deny"
    actions   = ["s3:PutObject"]
    resources = ["${local.root}adapters/*/aliases/*", "${local.root}adapters/*/watermark.json"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "Null"
      variable = "s3:if-match"
      values   = ["true"]
    }

    condition {
      test     = "Null"
      variable = "s3:if-none-match"
      values   = ["true"]
    }

    condition {
      test     = "Bool"
      variable = "s3:ObjectCreationOperation"
      values   = ["true"]
    }
  }

  # A manifest vouches for a folder and every file in it, an event for what happened, an erasure for what must never come
  # back: they are created once.
  statement {
    sid     = "FoldersAndEventsAreWrittenOnce"
    effect  = "Deny"
    actions = ["s3:PutObject"]

    resources = [
      "${local.root}*/manifest.json",
      "${local.root}adapters/*/signatures/*",
      "${local.root}adapters/*/events/*",
      "${local.root}erased/*",
      "${local.root}datasets/*",
      "${local.root}bases/*",
      "${local.root}adapters/*/versions/*",
    ]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "Null"
      variable = "s3:if-none-match"
      values   = ["true"]
    }

    condition {
      test     = "Bool"
      variable = "s3:ObjectCreationOperation"
      values   = ["true"]
    }
  }

  # Deleting could undo what the two above protect: a manifest that is gone can be created anew.
  statement {
    sid    = "OnlyTheAdminDeletesFromTheRegistry"
    effect = "Deny"

    actions = [
      "s3:DeleteObject",
      "s3:DeleteObjectVersion",
    ]

    resources = [
      "${local.root}adapters/*",
      "${local.root}datasets/*",
      "${local.root}bases/*",
      "${local.root}evaluations/*",
      "${local.root}erased/*",
    ]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "ArnNotEquals"
      variable = "aws:PrincipalArn"
      values   = [aws_iam_role.admin.arn]
    }
  }
}

resource "aws_s3_bucket_policy" "registry" {
  bucket = aws_s3_bucket.registry.id
  policy = data.aws_iam_policy_document.bucket.json

  depends_on = [aws_s3_bucket_public_access_block.registry]
}
