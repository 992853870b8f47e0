"""mosec, a server in Rust, with batching. The body of a request is the image: ``... .mosec_app --port PORT``."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from mosec import Server, Worker
from numpy.typing import NDArray

from benchmarks.compare_servers.apps.preprocessing import decode


class Decode(Worker):
    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> NDArray[np.uint8]:
        return decode(data)


class Classify(Worker):
    def __init__(self) -> None:
        super().__init__()
        from benchmarks.compare_servers.apps.torch_network import TorchNetwork  # processes that decode do not load torch

        self.network = TorchNetwork()

    def forward(self, data: list[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        return self.network.predict(data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Decode, num=len(os.sched_getaffinity(0)))
    server.append_worker(Classify, num=1, max_batch_size=8, max_wait_time=5)
    server.run()
