# syntax=docker/dockerfile:1
# Two images: `gpu` trains, on one node or several; `cpu` runs the tests. Building and running: docs/docker.md.

# Each may be given by digest: name@sha256:…. CUDA_IMAGE has the CUDA (major and minor) that constraints.txt's torch was
# built with, and nvcc (devel): DeepSpeed's ops are compiled where they first run, for the very processor and GPU that
# are there, and kept in /cache.
ARG CUDA_IMAGE=nvidia/cuda:13.0.3-devel-ubuntu24.04
ARG CPU_IMAGE=debian:bookworm-slim
# 1 adds NVIDIA apex to the gpu image. ki_ds itself never needs it.
ARG WITH_APEX=0
# the id of the user in the images
ARG USER_ID=1000
ARG GROUP_ID=1000

# ------------------------------------------------------------------------------------------------------------- gpu
FROM ${CUDA_IMAGE} AS python-gpu
ARG USER_ID
ARG GROUP_ID
RUN --mount=type=bind,source=docker,target=/tmp/docker /tmp/docker/system.sh ${USER_ID} ${GROUP_ID}

ENV PATH=/opt/venv/bin:${PATH}
# Dependencies alone, so that a change of the source does not install them again: the package is installed as a link to
# /opt/ki_ds, which the last stages fill. PIP_…: pip's own settings, for a mirror.
COPY setup.cfg pyproject.toml constraints.txt /opt/ki_ds/
COPY ki_ds/__init__.py /opt/ki_ds/ki_ds/
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv && \
    pip install --constraint /opt/ki_ds/constraints.txt --editable "/opt/ki_ds[gpu,mpi,s3]"

# apex is on no package index (the one of that name there is something else): the wheel is compiled from its repository.
FROM python-gpu AS apex-wheel
ARG APEX_REF=10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4
ADD https://github.com/NVIDIA/apex.git#${APEX_REF} /opt/apex
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0"
ARG MAX_JOBS=8
RUN --mount=type=cache,target=/root/.cache/pip \
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /opt/apex

FROM python-gpu AS apex-0

FROM python-gpu AS apex-1
RUN --mount=type=bind,from=apex-wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --no-deps /wheels/apex-*.whl && \
    python -c "import importlib.util as u; assert u.find_spec('amp_C') and u.find_spec('apex_C'), 'no extensions'"

# hadolint ignore=DL3006
FROM apex-${WITH_APEX} AS gpu
ARG USER_ID
ARG GROUP_ID
COPY . /opt/ki_ds
ENV HOME=/home/ki_ds USER=ki_ds PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    TRITON_CACHE_DIR=/cache/triton
USER ${USER_ID}:${GROUP_ID}
WORKDIR /workspace
HEALTHCHECK --interval=60s --timeout=30s --start-period=60s CMD ["/usr/local/lib/ki_ds/healthcheck.sh"]
ENTRYPOINT ["tini", "--", "/usr/local/lib/ki_ds/entrypoint.sh"]
CMD ["ki-ds", "doctor"]
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CUDA_IMAGE
LABEL org.opencontainers.image.title="ki_ds" \
    org.opencontainers.image.description="Knowledge inheritance on DeepSpeed, with CUDA" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="${CUDA_IMAGE}"

# ------------------------------------------------------------------------------------------------------------- cpu
FROM ${CPU_IMAGE} AS cpu
ARG USER_ID
ARG GROUP_ID
RUN --mount=type=bind,source=docker,target=/tmp/docker /tmp/docker/system.sh ${USER_ID} ${GROUP_ID}

ENV PATH=/opt/venv/bin:${PATH}
COPY --chown=${USER_ID}:${GROUP_ID} setup.cfg pyproject.toml constraints.txt /opt/ki_ds/
COPY --chown=${USER_ID}:${GROUP_ID} ki_ds/__init__.py /opt/ki_ds/ki_ds/
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv && \
    pip install --constraint /opt/ki_ds/constraints.txt --editable "/opt/ki_ds[test]"

COPY --chown=${USER_ID}:${GROUP_ID} . /opt/ki_ds
ENV HOME=/home/ki_ds USER=ki_ds PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    TRITON_CACHE_DIR=/cache/triton
USER ${USER_ID}:${GROUP_ID}
WORKDIR /opt/ki_ds
HEALTHCHECK --interval=60s --timeout=30s --start-period=60s CMD ["/usr/local/lib/ki_ds/healthcheck.sh"]
ENTRYPOINT ["tini", "--", "/usr/local/lib/ki_ds/entrypoint.sh"]
CMD ["pytest", "-n", "2", "--dist", "loadfile"]
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CPU_IMAGE
LABEL org.opencontainers.image.title="ki_ds" \
    org.opencontainers.image.description="The tests of ki_ds, without a GPU" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="${CPU_IMAGE}"
