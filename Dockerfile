# latentd as a container image.
#
#   docker build -t latentd .                      the demo model on CPUs, through ONNX Runtime
#   docker build --target cuda -t latentd:cuda .   NVIDIA GPUs, through TensorRT; compiles what its bundle lacks
#   … --build-arg EXTRAS=jobs,otel                 with more extras of pyproject.toml, such as ray
#
# Neither holds torch or a compiler, and neither runs as root. docs/deployment.md describes how to run them.

# The digest is that of the index of all architectures, and scripts/base-image updates it: two builds have the same base,
# and Debian's security fixes arrive as a change of this line. CUDA comes with the wheels, and the driver's libraries from
# the NVIDIA Container Toolkit, so GPUs need no other base.
ARG BASE=python:3.13.16-slim-trixie@sha256:bf44cdfcb76cd3b41e879bc058fc37ec5872002ccfde7fcb765e218cde0cd79c
FROM ${BASE} AS base
ENV PATH=/opt/latentd/bin:$PATH \
    PYTHONUNBUFFERED=1
RUN python -m venv --without-pip /opt/latentd


FROM base AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml ./
COPY scripts/requirements scripts/constraints.txt scripts/constraints-cuda.txt scripts/
RUN python -m venv --without-pip /opt/cyclonedx \
 && pip --python /opt/cyclonedx install cyclonedx-bom --constraint scripts/constraints.txt


# Packages before code: an edit of the code builds, and ships, none of them again. An architecture without wheels is
# refused before pip spends minutes, and fails in a compiler's words.
FROM builder AS cpu-packages
RUN case "$(dpkg --print-architecture)" in \
      amd64|arm64) ;; \
      *) echo "The target cpu is for amd64 and arm64, for which ONNX Runtime has wheels: build with --platform linux/amd64 or linux/arm64." >&2; exit 1 ;; \
    esac
ARG EXTRAS
RUN scripts/requirements cpu compile "${EXTRAS}" > requirements.txt \
 && pip --python /opt/latentd install --requirement requirements.txt --constraint scripts/constraints.txt


FROM builder AS cuda-packages
RUN case "$(dpkg --print-architecture)" in \
      amd64) ;; \
      *) echo "The target cuda is for amd64 alone: build with --platform linux/amd64, or the target cpu." >&2; exit 1 ;; \
    esac
ARG EXTRAS
RUN scripts/requirements cuda compile "${EXTRAS}" > requirements.txt \
 && pip --python /opt/latentd install --requirement requirements.txt \
      --constraint scripts/constraints.txt --constraint scripts/constraints-cuda.txt


FROM builder AS code
RUN pip install setuptools==84.2.1
COPY LICENSE README.md build_engines.py ./
COPY engines engines
COPY server server
COPY deploy/ray deploy/ray
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && pip --python /opt/latentd install --no-deps /wheels/*.whl \
 && mkdir -p /bundles/demo \
 && cp -r engines/demo/manifest.json engines/demo/tokenizer.json engines/demo/onnx /bundles/demo


# What each image holds, as its packages' own metadata have it. The generator is outside of /opt/latentd, and stays here.
FROM cpu-packages AS cpu-sbom
COPY --from=code /opt/latentd /opt/latentd
RUN /opt/cyclonedx/bin/cyclonedx-py environment /opt/latentd --pyproject pyproject.toml --output-reproducible \
      --validate --output-file /sbom.cdx.json


FROM cuda-packages AS cuda-sbom
COPY --from=code /opt/latentd /opt/latentd
RUN /opt/cyclonedx/bin/cyclonedx-py environment /opt/latentd --pyproject pyproject.toml --output-reproducible \
      --validate --output-file /sbom.cdx.json


# What both images are, but for their packages. The user is a number, by which Kubernetes sees that it is not root.
FROM base AS runtime
RUN groupadd --gid 10001 latentd \
 && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /bundles latentd \
 && install --directory --owner=10001 --group=10001 /bundles
LABEL org.opencontainers.image.title="latentd" \
      org.opencontainers.image.description="A server that makes pictures from text with Stable Diffusion, batched at the denoising step." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# Docker kills 10 seconds after it asks, and whoever still waits should hear of it before. Raise both together.
# ONNX Runtime's wheels tell their makers of each use unless this is set before they are imported.
ENV LATENTD_DRAIN_SECONDS=7 \
    LATENTD_HOST=0.0.0.0 \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /bundles
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Alive, not ready: one that compiles is not ready, and must not be replaced for it. Not urllib: it would ask a proxy,
# where the environment names one.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", "import http.client, os, sys; server = http.client.HTTPConnection('127.0.0.1', int(os.getenv('LATENTD_PORT', '8000')), timeout=4); server.request('GET', '/v2/health/live'); sys.exit(server.getresponse().status != 200)"]
ENTRYPOINT ["latentd"]


# The bundle lies where engines can be written beside it: Docker fills an empty volume with it at the first start.
FROM runtime AS cuda
ENV LATENTD_BUNDLE=/bundles/demo \
    LATENTD_COMPILE=true \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all
COPY --from=cuda-packages /opt/latentd /opt/latentd
COPY --from=code /opt/latentd /opt/latentd
COPY --from=cuda-sbom /sbom.cdx.json /usr/share/doc/latentd/sbom.cdx.json
COPY --from=code --chown=10001:10001 /bundles /bundles
VOLUME /bundles
# Last, since they differ from build to build.
ARG REVISION=""
ARG CREATED=""
LABEL org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"


FROM runtime AS cpu
COPY --from=cpu-packages /opt/latentd /opt/latentd
COPY --from=code /opt/latentd /opt/latentd
COPY --from=cpu-sbom /sbom.cdx.json /usr/share/doc/latentd/sbom.cdx.json
# Last, since they differ from build to build.
ARG REVISION=""
ARG CREATED=""
LABEL org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
