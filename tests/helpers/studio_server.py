"""Run the service with the studio (``Studio``), send requests to it, and find the processes of its trainings."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tests.helpers.server import Response, Server, poll, serve

TRAINING_S = 600.0  # the machine may be busy
KEY = {"X-API-Key": "sesame"}


class Studio:
    """A service with the studio, which can be killed and started again with the same folders and database."""

    def __init__(self, bundle: Path, folder: Path, data: Path, **settings: object) -> None:
        self.bundle, self.folder = bundle, folder
        self._settings: dict[str, object] = {
            "studio": 1,
            "studio_dir": folder / "studio",
            "database_url": f"sqlite:///{folder / 'reviews.db'}",
            "data_dir": data,
            "admin_keys": "ann:sesame",
            "studio_niceness": 0,
            "web_concurrency": 2,
            "first_byte_timeout_s": 300,
            **settings,
        }
        self._stack = contextlib.ExitStack()
        self.server = self._start()

    def _start(self) -> Server:
        return self._stack.enter_context(serve(self.bundle, **self._settings))

    def request(
        self, method: str, path: str, body: bytes | None = None, *, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Send a request again as long as the worker that receives it has not opened its database yet."""

        def send() -> Response | None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the machine may be busy with the resumed training
                response = self.server.request(method, path, body, headers=headers)
                return None if response.status == 503 else response
            return None

        return cast("Response", poll(send))

    def get(self, path: str, **headers: str) -> Response:
        return self.request("GET", path, headers=headers)

    def restart(self, by: signal.Signals) -> None:
        """End the service with a signal, wait until it has ended, and start it again."""
        os.kill(self.server.pid, by)
        self.server.process.wait(TRAINING_S)
        self._stack.close()
        self.server = self._start()

    def close(self) -> None:
        self._stack.close()

    def post(self, path: str, **fields: Any) -> Response:
        headers = {"Content-Type": "application/json", **KEY}
        return self.request("POST", f"/studio/{path}", json.dumps(fields).encode(), headers=headers)

    def submit(self, **fields: str) -> int:
        response = self.post("jobs", data="folder:", backbone="efficientnet_lite0", **fields)
        assert response.status == 201, response.body
        assert response.headers["Location"] == f"/studio/jobs/{response.json()['id']}"
        return int(response.json()["id"])

    def job(self, id_: int) -> dict[str, Any]:
        return dict(self.get(f"/studio/jobs/{id_}").json())

    def wait_for(self, id_: int, state: str) -> dict[str, Any]:
        def is_reached() -> bool:
            now = self.job(id_)
            assert now["state"] in (state, "queued", "running"), now
            return bool(now["state"] == state)

        poll(is_reached, within_s=TRAINING_S, every_s=0.2)
        return self.job(id_)

    def wait_for_epoch(self, id_: int, epoch: int) -> None:
        poll(lambda: self.job(id_)["progress"]["epoch"] >= epoch, within_s=TRAINING_S, every_s=0.2)

    def page(self, path: str) -> str:
        response = self.get(path, Accept="text/html")
        assert response.status == 200, response.body
        return response.body.decode()

    def predicted_by(self, photo: Path) -> str:
        response = self.request("POST", "/predict", photo.read_bytes(), headers={"Content-Type": "image/jpeg"})
        return str(response.json()["model"]["version"])

    def processes(self, word: str) -> list[int]:
        """Return the ids of the processes of this studio whose command line contains ``word``."""
        own = f"STUDIO_DIR={self.folder / 'studio'}\0".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if word.encode() in (process / "cmdline").read_bytes() and own in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found

    def training_pid(self, run: str) -> int:
        return poll(lambda: self.processes(f"/runs/{run}\0"))[0]
