# Two images. `serve`, the default, classifies images with the included bundle and contains neither PyTorch nor a compiler.
# `finetune` trains, and also serves on a GPU.
#
#   docker build -t dogs-vs-cats .
#   docker build --target finetune -t dogs-vs-cats-finetune .
#
# Both install the versions of requirements.lock, like `make setup`. PIP_ARGS is passed to pip, for example for another index.
# --build-arg EXTRAS=heic adds the decoder of HEIC photos; docs/serving.md describes its license.

# ---- requirements: only these lines of pyproject.toml decide whether packages are installed again -------------------------
FROM python:3.11-slim-bookworm AS requirements
WORKDIR /requirements
COPY pyproject.toml tools/requirements.py ./
ARG EXTRAS=""
RUN python requirements.py serve $EXTRAS > serve.txt && python requirements.py finetune $EXTRAS > finetune.txt

# ---- packages: what the service imports, without the files that it never opens --------------------------------------------
FROM python:3.11-slim-bookworm AS packages
ARG PIP_ARGS=""
WORKDIR /build
COPY requirements.lock tools/slim.py ./
COPY --from=requirements /requirements/serve.txt ./
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --quiet $PIP_ARGS \
      -c requirements.lock -r serve.txt \
 && python slim.py /opt/venv

# ---- finetune: all packages, including PyTorch -----------------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS finetune
ARG PIP_ARGS=""
WORKDIR /build
COPY requirements.lock ./
COPY --from=requirements /requirements/finetune.txt ./
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --quiet $PIP_ARGS \
      -c requirements.lock -r finetune.txt
COPY --from=requirements /requirements/serve.txt ./
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
    XDG_CACHE_HOME=/cache \
    BUNDLE=/app/models/shipped/dogs-vs-cats \
    HOST=0.0.0.0 \
    PORT=8000
# A short training shows that nothing is missing, and writes the bytecode of what it imports: a read-only container cannot.
RUN python -m finetune synthesize /tmp/smoke/pictures --train 24 --valid 8 \
 && python -m finetune train /tmp/smoke/pictures --backbone efficientnet_lite0 --epochs 1 --output-dir /tmp/smoke/run \
 && rm -rf /tmp/* /cache/*
WORKDIR /work
ARG REVISION=""
LABEL org.opencontainers.image.title="dogs-vs-cats-finetune" \
      org.opencontainers.image.description="Turn a folder of labeled photos into a verified classifier bundle" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="$REVISION"
USER 10001:10001
ENTRYPOINT ["python", "-m", "finetune"]
CMD ["--help"]

# ---- serve -----------------------------------------------------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS serve
# Folders for volumes: bundles, the cache, and the database of reviews.
RUN groupadd --gid 10001 classifier \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home classifier \
 && install -d -o 10001 -g 10001 /bundles /cache /state
COPY --from=packages /opt/venv /opt/venv
COPY --chown=10001:10001 models/shipped/dogs-vs-cats /bundles/shipped
RUN ln -s shipped /bundles/current
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
# Start the service once. This fails if slim.py removed a needed file, and writes the bytecode of exactly what is imported.
RUN --mount=type=bind,source=tools,target=/build \
    XDG_CACHE_HOME=/tmp/smoke DATABASE_URL=sqlite:////tmp/smoke/reviews.db python /build/smoke.py && rm -rf /tmp/smoke
ARG REVISION=""
LABEL org.opencontainers.image.title="dogs-vs-cats" \
      org.opencontainers.image.description="Classify images over HTTP, and review the predictions" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="$REVISION"
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-m", "service.healthcheck"]
CMD ["python", "-m", "service"]
