# Who may do what. A role is taken by service accounts of one namespace, or by people (admin); there are no access keys.
# fineloop-reaper stops Ray jobs and reads no object: it has no role.

locals {
  # Who takes which role. In a shared cluster the head runs the jobs' own processes, as fineloop-experiments.
  subjects = {
    fineloop-pipeline  = ["system:serviceaccount:${var.namespace}:fineloop-pipeline"]
    fineloop-evaluator = ["system:serviceaccount:${var.namespace}:fineloop-evaluator"]
    fineloop-trainer = [
      "system:serviceaccount:${var.namespace}:fineloop-trainer",
      "system:serviceaccount:${var.namespace}:fineloop-experiments",
    ]
  }
  issuer = replace(var.oidc_provider_arn, "/^.*:oidc-provider\\//", "")
  # A bucket must be listed to read what lies in it.
  source_buckets = distinct([for arn in var.source_arns : split("/", arn)[0]])
}

data "aws_iam_policy_document" "service_account" {
  for_each = local.subjects

  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]

    principals {
      type        = "Federated"
      identifiers = [var.oidc_provider_arn]
    }

    condition {
      test     = "StringEquals"
      variable = "${local.issuer}:sub"
      values   = each.value
    }

    condition {
      test     = "StringEquals"
      variable = "${local.issuer}:aud"
      values   = ["sts.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "people" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "AWS"
      identifiers = var.admin_principal_arns
    }
  }
}

# Every role reads the whole registry, and the sources that are named.
data "aws_iam_policy_document" "reader" {
  statement {
    sid       = "ReadTheRegistry"
    actions   = ["s3:GetObject"]
    resources = ["${local.root}*"]
  }

  statement {
    sid       = "ListTheRegistry"
    actions   = ["s3:ListBucket", "s3:GetBucketLocation"]
    resources = [aws_s3_bucket.registry.arn]
  }

  dynamic "statement" {
    for_each = length(var.source_arns) > 0 ? [1] : []

    content {
      sid       = "ReadSources"
      actions   = ["s3:GetObject"]
      resources = var.source_arns
    }
  }

  dynamic "statement" {
    for_each = length(var.source_arns) > 0 ? [1] : []

    content {
      sid       = "ListSources"
      actions   = ["s3:ListBucket"]
      resources = local.source_buckets
    }
  }

  dynamic "statement" {
    for_each = var.kms_key_arn == "" ? [] : [1]

    content {
      sid       = "UseTheKey"
      actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
      resources = [var.kms_key_arn]
    }
  }
}

# Ray pods: they publish versions. Where registry.trusted_keys are set, they cannot decide which one is in production;
# elsewhere what they write below runs/ is what the gate decides on.
data "aws_iam_policy_document" "trainer" {
  source_policy_documents = [data.aws_iam_policy_document.reader.json]

  statement {
    sid = "WriteWhatTrainingMakes"

    actions = ["s3:PutObject", "s3:AbortMultipartUpload"]

    resources = [
      "${local.root}datasets/*",
      "${local.root}runs/*",
      "${local.root}bases/*",
      "${local.root}adapters/*/versions/*",
      "${local.root}adapters/*/events/*",
      "${local.root}pages/changed/*",
      "${local.root}.check/*",
    ]
  }

  statement {
    sid       = "DropOlderCheckpoints"
    actions   = ["s3:DeleteObject"]
    resources = ["${local.root}runs/*/checkpoints/*", "${local.root}.check/*"]
  }
}

# Ray pods of the jobs that only evaluate: they write what the step then signs, and nothing else.
data "aws_iam_policy_document" "evaluator" {
  source_policy_documents = [data.aws_iam_policy_document.reader.json]

  statement {
    sid = "WriteWhatEvaluatingMeasures"

    actions = ["s3:PutObject", "s3:AbortMultipartUpload"]

    resources = [
      "${local.root}evaluations/*/evaluation.json",
      "${local.root}evaluations/*/evaluation_records.parquet",
      "${local.root}evaluations/*/ray-evaluate*",
    ]
  }
}

# The steps, the promoter among them: they move aliases, and cannot make what an alias points at.
data "aws_iam_policy_document" "pipeline" {
  source_policy_documents = [data.aws_iam_policy_document.reader.json]

  statement {
    sid = "WriteWhatStepsMake"

    actions = ["s3:PutObject", "s3:AbortMultipartUpload"]

    resources = [
      "${local.root}datasets/*",
      "${local.root}runs/*",
      "${local.root}evaluations/*/evaluation.dsse.json",
      "${local.root}evaluations/*/decision.json",
      "${local.root}adapters/*/aliases/*",
      "${local.root}adapters/*/watermark.json",
      "${local.root}adapters/*/events/*",
      "${local.root}adapters/*/signatures/*",
      "${local.root}adapters/*/rates/*",
      "${local.root}adapters/*/index/*",
      "${local.root}pages/*",
      "${local.root}.check/*",
    ]
  }

  statement {
    sid       = "RemoveProbes"
    actions   = ["s3:DeleteObject"]
    resources = ["${local.root}.check/*"]
  }
}

# People: `fineloop adapters promote`, `rollback` and `gc`, and `fineloop data erase`. They publish no version.
data "aws_iam_policy_document" "admin" {
  source_policy_documents = [data.aws_iam_policy_document.reader.json]

  statement {
    sid = "MoveAliases"

    actions = ["s3:PutObject"]

    resources = [
      "${local.root}adapters/*/aliases/*",
      "${local.root}adapters/*/watermark.json",
      "${local.root}adapters/*/events/*",
      "${local.root}adapters/*/signatures/*",
      "${local.root}adapters/*/index/*",
      "${local.root}pages/changed/*",
      "${local.root}pages/index.json",
      "${local.root}erased/*",
      "${local.root}.check/*",
    ]
  }

  # A delete marker, that is: what it hides comes back by removing it, until noncurrent_days have passed.
  statement {
    sid     = "DeleteWhatIsOld"
    actions = ["s3:DeleteObject"]

    resources = [
      "${local.root}adapters/*/versions/*",
      "${local.root}datasets/*",
      "${local.root}bases/*",
      "${local.root}runs/*",
      "${local.root}evaluations/*",
      "${local.root}.check/*",
    ]
  }
}

resource "aws_iam_role" "trainer" {
  name               = "${var.bucket}-trainer"
  description        = "Fineloop's Ray pods: publish versions, move no alias."
  assume_role_policy = data.aws_iam_policy_document.service_account["fineloop-trainer"].json
}

resource "aws_iam_role_policy" "trainer" {
  name   = "registry"
  role   = aws_iam_role.trainer.id
  policy = data.aws_iam_policy_document.trainer.json
}

resource "aws_iam_role" "evaluator" {
  name               = "${var.bucket}-evaluator"
  description        = "Fineloop's Ray pods that only evaluate: publish no version, move no alias."
  assume_role_policy = data.aws_iam_policy_document.service_account["fineloop-evaluator"].json
}

resource "aws_iam_role_policy" "evaluator" {
  name   = "registry"
  role   = aws_iam_role.evaluator.id
  policy = data.aws_iam_policy_document.evaluator.json
}

resource "aws_iam_role" "pipeline" {
  name               = "${var.bucket}-pipeline"
  description        = "Fineloop's pipeline steps: move aliases, publish no version."
  assume_role_policy = data.aws_iam_policy_document.service_account["fineloop-pipeline"].json
}

resource "aws_iam_role_policy" "pipeline" {
  name   = "registry"
  role   = aws_iam_role.pipeline.id
  policy = data.aws_iam_policy_document.pipeline.json
}

resource "aws_iam_role" "admin" {
  name               = "${var.bucket}-admin"
  description        = "People who promote, roll back and delete old versions by hand."
  assume_role_policy = data.aws_iam_policy_document.people.json
}

resource "aws_iam_role_policy" "admin" {
  name   = "registry"
  role   = aws_iam_role.admin.id
  policy = data.aws_iam_policy_document.admin.json
}
