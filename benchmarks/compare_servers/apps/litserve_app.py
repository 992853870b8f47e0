"""LitServe with batching: ``python -m benchmarks.compare_servers.apps.litserve_app PORT WORKERS``."""

import sys
from typing import Any

import litserve
import numpy as np
from fastapi import Request
from numpy.typing import NDArray

from benchmarks.compare_servers.apps.preprocessing import decode
from benchmarks.compare_servers.apps.torch_network import TorchNetwork


class ClassifierAPI(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.network = TorchNetwork()

    # LitServe looks at this annotation, which must not be a string.
    def decode_request(self, request: Request) -> NDArray[np.uint8]:
        return decode(request["file"].file.read())

    def batch(self, inputs: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        return inputs

    def predict(self, images: list[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        return self.network.predict(images)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    api = ClassifierAPI(max_batch_size=8, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(sys.argv[2]), timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, generate_client_file=False, log_level="error")
