"""Start the installed service, request every kind of page and prediction, and stop it.

    BUNDLE=/bundles/current python tools/smoke.py

This is the last step of the image's build. It fails if a needed file is missing, and writes the bytecode of exactly the
modules that the service imports, because a read-only container cannot write it later.
"""

from __future__ import annotations

import http.client
import importlib
import io
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import time

from PIL import Image

import service

NOT_IMPORTABLE = ("service.__main__", "service.db.migrations.")  # run by Python and by Alembic
LAZY_IMPORTS = ("alembic.command", "psycopg")  # imported when a database is opened
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
PAGES = ("/", "/model", "/docs", "/openapi.json", "/models", "/metrics", "/health/live", "/gallery", "/gallery/photos.json")
READY_S = 120.0


def main() -> int:
    for module in pkgutil.walk_packages(service.__path__, "service."):
        if not module.name.startswith(NOT_IMPORTABLE):
            importlib.import_module(module.name)
    for name in LAZY_IMPORTS:
        importlib.import_module(name)
    port = _free_port()
    environ = {**os.environ, "HOST": "127.0.0.1", "PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-m", "service"], env=environ)
    try:
        _wait_until_ready(process, environ)
        for path in PAGES:
            _expect_200(port, path)
        for name in FORMATS:
            response = json.loads(_expect_200(port, "/predict", _encode_image(name)))
            print(f"smoke: {name} is {response['predictions'][0]['label']}")
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
    if code:
        print(f"smoke: the service stopped with exit code {code}", file=sys.stderr)
    return code


def _wait_until_ready(process: subprocess.Popen[bytes], environ: dict[str, str]) -> None:
    until = time.monotonic() + READY_S
    while subprocess.run([sys.executable, "-m", "service.healthcheck"], env=environ, stderr=subprocess.DEVNULL).returncode:
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit("smoke: the service did not become ready; see its log")
        time.sleep(0.1)


def _expect_200(port: int, path: str, image: bytes | None = None) -> bytes:
    until = time.monotonic() + READY_S
    status, body = _request(port, path, image)
    while status == 503 and time.monotonic() < until:  # the gallery is still loading
        time.sleep(0.1)
        status, body = _request(port, path, image)
    if status != 200:
        raise SystemExit(f"smoke: {path} returned {status}: {body.decode('utf-8', 'replace')}")
    return body


def _request(port: int, path: str, image: bytes | None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Content-Type": "application/octet-stream"} if image else {}
    connection.request("POST" if image else "GET", path, image, headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _encode_image(name: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, name)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
