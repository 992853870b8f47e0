"""Start the service as it is installed, ask it for everything that a person would, and stop it.

    BUNDLE=/bundles/current python tools/smoke.py

The image runs this last: it fails where something that is needed was left out, and leaves the byte code of exactly those
modules that the service imports, which a process that may not write could not keep for itself.
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

NOT_BY_ITSELF = ("service.__main__", "service.db.migrations.")  # run by Python and by Alembic
BY_NAME = ("alembic.command", "psycopg")  # imported where a database is opened
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
PAGES = ("/", "/model", "/docs", "/openapi.json", "/models", "/metrics", "/health/live", "/gallery", "/gallery/photos.json")
READY_S = 120.0


def main() -> int:
    for module in pkgutil.walk_packages(service.__path__, "service."):
        if not module.name.startswith(NOT_BY_ITSELF):
            importlib.import_module(module.name)
    for name in BY_NAME:
        importlib.import_module(name)
    port = _free_port()
    environ = {**os.environ, "HOST": "127.0.0.1", "PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-m", "service"], env=environ)
    try:
        _wait_until_ready(process, environ)
        for path in PAGES:
            _expect_200(port, path)
        for name in FORMATS:
            answer = json.loads(_expect_200(port, "/predict", _photo(name)))
            print(f"smoke: {name} is {answer['predictions'][0]['label']}")
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
            raise SystemExit("smoke: the service never got ready; its log says why")
        time.sleep(0.1)


def _expect_200(port: int, path: str, photo: bytes | None = None) -> bytes:
    until = time.monotonic() + READY_S
    status, said = _ask(port, path, photo)
    while status == 503 and time.monotonic() < until:  # the gallery is being filled
        time.sleep(0.1)
        status, said = _ask(port, path, photo)
    if status != 200:
        raise SystemExit(f"smoke: {path} gave {status}: {said.decode('utf-8', 'replace')}")
    return said


def _ask(port: int, path: str, photo: bytes | None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    kind = {"Content-Type": "application/octet-stream"} if photo else {}
    connection.request("POST" if photo else "GET", path, photo, kind)
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    return answer.status, said


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _photo(name: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, name)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
