# The image of every pipeline step and of `fineloop reap`: no torch. Built from the repository's root by `make images`.
# Without PYTHON_DIGEST, which `make pin` looks up, this is no image name and the build stops.
ARG PYTHON_DIGEST
FROM docker.io/library/python:3.11-slim-trixie@${PYTHON_DIGEST}

# One source publishes no wheel. It is built with the hashed tools of build.lock, as an isolated build would fetch its own.
COPY infra/images/build.lock infra/images/step.lock /locks/
RUN pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: -r /locks/build.lock \
    && pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: --no-binary kfp-server-api \
        --no-build-isolation -r /locks/step.lock \
    && useradd --uid 1000 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin fineloop

# The code is imported as it stands, owned by root: the user that runs it cannot change it.
COPY components /app/components
COPY pipelines /app/pipelines
RUN python -m compileall -q /app

# Everything that is written goes to /tmp, so that the root file system may be read-only.
ENV HOME=/tmp \
    TMPDIR=/tmp \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_ENABLE_UV_RUN_RUNTIME_ENV=0

ARG REVISION=unknown
LABEL org.opencontainers.image.title="fineloop/step-python" \
    org.opencontainers.image.description="Fineloop's pipeline steps: prepare, gate, promote, report, and what starts Ray jobs" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision="${REVISION}"

WORKDIR /app
USER 1000:1000
CMD ["python", "-m", "pipelines.cli", "--help"]
