# The training image; docker/build (make image) builds it, docs/how-to/run-the-image.md tells how to run it.
#
# Three layers, each changing more often than the one before: PyTorch and CUDA (gigabytes), the other dependencies, the
# package. Each is made in a stage of its own and copied: a new version of the package moves only its own small layer.
#
# PyTorch's wheels bring CUDA's libraries; the base only has to make the container runtime pass the driver in. Any
# Debian 12 or Ubuntu 24.04 will do. Its digest is not pinned here: find it with `docker buildx imagetools inspect IMAGE`
# and pin it with --build-arg BASE_IMAGE=IMAGE@sha256:...
ARG BASE_IMAGE=docker.io/nvidia/cuda:13.0.3-base-ubuntu24.04

FROM ${BASE_IMAGE} AS base
ENV PATH=/opt/cyclevae/bin:$PATH LC_ALL=C.UTF-8
# With SOURCE_DATE_EPOCH bytecode carries the hash of its source, not its time, so the same sources give the same bytes.
# Versions are the distribution's: one list for Debian and Ubuntu. g++ and Python's headers are for
# training.compile_model: what torch.compile generates is built where it runs, with them on CPUs and on GPUs alike.
# hadolint ignore=DL3008
RUN export SOURCE_DATE_EPOCH=315532800 DEBIAN_FRONTEND=noninteractive \
    && apt-get update --quiet=2 \
    && apt-get install --quiet=2 --yes --no-install-recommends \
        ca-certificates g++ libpython3-dev python3 tini \
    && rm -rf /var/lib/apt/lists/* \
    && find /var/cache /var/log -type f -delete \
    && find /usr/lib -name "libpython*.a" -delete \
    && python3 -m venv --without-pip /opt/cyclevae

FROM base AS builder
# hadolint ignore=DL3008
RUN apt-get update --quiet=2 \
    && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/cyclevae
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONHASHSEED=0
COPY docker/install-layer /usr/local/bin/
COPY docker/build.lock /locks/
RUN pip install --quiet --require-hashes --no-deps --only-binary :all: --requirement /locks/build.lock

FROM builder AS torch
# Another PyTorch than the lock's: --build-arg TORCH="torch==2.13.0+cpu", from where pip is set up to look
ARG TORCH="--require-hashes --requirement /locks/torch.lock"
COPY docker/torch.lock /locks/
# hadolint ignore=SC2086
RUN install-layer /layer --only-binary :all: ${TORCH}

FROM builder AS dependencies
COPY docker/requirements.lock /locks/
# ANTLR's runtime has no wheel.
RUN install-layer /layer --only-binary :all: --no-binary antlr4-python3-runtime \
    --require-hashes --requirement /locks/requirements.lock

FROM builder AS wheel
ARG REVISION=""
ARG SOURCE_DATE_EPOCH=315532800
COPY pyproject.toml /source/
COPY job /source/job
COPY configs /source/configs
COPY hydra_plugins /source/hydra_plugins
RUN built=$(date --utc --date=@$SOURCE_DATE_EPOCH +%FT%TZ) \
    && printf '{"revision": "%s", "built": "%s"}\n' "$REVISION" "$built" > /source/job/build.json \
    && chmod -R u=rwX,go=rX /source \
    && pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheel /source
# With --build-arg WHEEL_SHA256=... only that wheel goes into the image.
ARG WHEEL_SHA256=""
RUN sum=$(sha256sum /wheel/*.whl) \
    && printf 'cyclevae @ file://%s --hash=sha256:%s\n' /wheel/*.whl "${WHEEL_SHA256:-${sum%% *}}" > /wheel/requirement.txt

FROM builder AS package
ARG SOURCE_DATE_EPOCH=315532800
COPY --from=wheel /wheel /wheel
RUN install-layer /layer/opt/cyclevae --require-hashes --requirement /wheel/requirement.txt
COPY docker/bin /layer/opt/cyclevae/bin
COPY docker/latentDLM_mmdit /layer/workspace/latentDLM_mmdit
# Of group 0 and writable to it, as OpenShift starts containers under any user of this group.
RUN chmod -R u=rwX,go=rX /layer \
    && chmod 755 /layer/opt/cyclevae/bin/* \
    && mkdir /layer/workspace/runs /layer/workspace/data \
    && chmod 775 /layer/workspace /layer/workspace/runs /layer/workspace/data \
    && find /layer -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +

FROM base
COPY --from=torch /layer /opt/cyclevae
COPY --from=dependencies /layer /opt/cyclevae
COPY --from=package /layer /
# No user needs to exist: home and caches are in /tmp, which may be all that can be written.
ENV HOME=/tmp USER=cyclevae PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /workspace
USER 1000:0
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/cyclevae/bin/entrypoint"]
CMD ["--help"]
ARG BASE_IMAGE
ARG VERSION=""
ARG REVISION=""
ARG CREATED=""
LABEL org.opencontainers.image.title="cyclevae" \
      org.opencontainers.image.description="Training of text-to-latent and latent-to-text diffusion with a cycle objective" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
