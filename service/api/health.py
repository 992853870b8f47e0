"""What an orchestrator and Prometheus ask: is it alive, is it ready, how does it do."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, jsonify
from prometheus_client import CONTENT_TYPE_LATEST

from service.inference.model_manager import ModelManager

bp = Blueprint("health", __name__)


def _served() -> ModelManager:
    served: ModelManager = current_app.extensions["model"]
    return served


@bp.get("/health/live")
def live() -> Response:
    return jsonify(status="alive")


@bp.get("/health/ready")
def ready() -> Response:
    model = _served().check_ready()
    return jsonify(status="ready", model=model.summary)


@bp.get("/metrics")
def metrics() -> Response:
    return Response(_served().metrics.render(), content_type=CONTENT_TYPE_LATEST)
