"""Flask as in PyTorch's tutorial, without batching: ``gunicorn benchmarks.compare_servers.apps.flask_app:app``."""

from __future__ import annotations

from flask import Flask, Response, jsonify, request

from benchmarks.compare_servers.apps.preprocessing import decode
from benchmarks.compare_servers.apps.torch_network import TorchNetwork

app = Flask(__name__)
network = TorchNetwork()


@app.post("/predict")
def predict() -> Response:
    return jsonify(network.predict([decode(request.files["file"].read())])[0])
