# Two images: `serve`, the default, answers photos with the shipped bundle and has neither PyTorch nor a compiler; `finetune`
# trains, and serves on a GPU.
#
#   docker build -t dogs-vs-cats .
#   docker build --target finetune -t dogs-vs-cats-finetune .
#
# Both install the versions of requirements.lock, as `make setup` does. PIP_ARGS is handed to pip, for an index of your own.

# ---- what pyproject.toml wants, so that another change in that file installs nothing anew ---------------------------------
FROM python:3.11-slim-bookworm AS wanted
WORKDIR /wanted
COPY pyproject.toml tools/requirements.py ./
RUN python requirements.py serve > serve.txt && python requirements.py finetune > finetune.txt

# ---- the service's packages, without what it never opens ------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS packages
ARG PIP_ARGS=""
WORKDIR /build
COPY requirements.lock tools/slim.py ./
COPY --from=wanted /wanted/serve.txt ./
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --quiet $PIP_ARGS \
      -c requirements.lock -r serve.txt \
 && python slim.py /opt/venv

# ---- everything, PyTorch too ----------------------------------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS training
ARG PIP_ARGS=""
WORKDIR /build
COPY requirements.lock ./
COPY --from=wanted /wanted/finetune.txt ./
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --quiet $PIP_ARGS \
      -c requirements.lock -r finetune.txt
COPY --from=wanted /wanted/serve.txt ./
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --quiet $PIP_ARGS -c requirements.lock -r serve.txt
RUN groupadd --gid 10001 classifier \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home classifier \
 && install -d -m 1777 /cache /state /work
COPY models /app/models
COPY service /app/service
COPY finetune /app/finetune
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=classifier \
    XDG_CACHE_HOME=/cache

# The shipped bundle holds only what was trained: its pretrained base is merged here, where PyTorch is. A short training shows
# that nothing is missing. Both leave the byte code of what they import, which a process that may not write cannot keep.
RUN python -m finetune merge /app/models/shipped/dogs-vs-cats /bundles/shipped \
 && ln -s shipped /bundles/current \
 && python -m finetune synthesize /tmp/smoke/pictures --train 24 --valid 8 \
 && python -m finetune train --data-dir /tmp/smoke/pictures --backbone efficientnet_lite0 --epochs 1 --output-dir /tmp/smoke/run \
 && rm -rf /tmp/* /cache/*

# ---- finetune -------------------------------------------------------------------------------------------------------------
FROM training AS finetune
ENV BUNDLE=/bundles/current \
    HOST=0.0.0.0 \
    PORT=8000
WORKDIR /work
ARG REVISION=""
LABEL org.opencontainers.image.title="dogs-vs-cats-finetune" \
      org.opencontainers.image.description="Makes a verified bundle of a folder of labelled photos" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="$REVISION"
USER 10001:10001
ENTRYPOINT ["python", "-m", "finetune"]
CMD ["--help"]

# ---- serve ----------------------------------------------------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS serve
# Folders for volumes: bundles; what can be made again; the database of reviews.
RUN groupadd --gid 10001 classifier \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home classifier \
 && install -d -o 10001 -g 10001 /bundles /cache /state
COPY --from=packages /opt/venv /opt/venv
COPY --from=training --chown=10001:10001 /bundles /bundles
COPY models /app/models
COPY service /app/service
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/cache \
    BUNDLE=/bundles/current \
    HOST=0.0.0.0 \
    PORT=8000
WORKDIR /app
# Started once: what was left out and is needed shows here, and the byte code of just what it imports is kept.
RUN --mount=type=bind,source=tools,target=/build \
    XDG_CACHE_HOME=/tmp/smoke DATABASE_URL=sqlite:////tmp/smoke/reviews.db python /build/smoke.py && rm -rf /tmp/smoke
ARG REVISION=""
LABEL org.opencontainers.image.title="dogs-vs-cats" \
      org.opencontainers.image.description="Says over HTTP what is on a photo" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="$REVISION"
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-m", "service.healthcheck"]
CMD ["python", "-m", "service"]
