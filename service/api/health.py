"""What an orchestrator and Prometheus ask: is it alive, is it ready, how does it do."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify
from prometheus_client import CONTENT_TYPE_LATEST

from service.context import services

bp = Blueprint("health", __name__)


@bp.get("/health/live")
def live() -> Response:
    return jsonify(status="alive")


@bp.get("/health/ready")
def ready() -> Response:
    model = services().model_manager.check_ready()
    return jsonify(status="ready", model=model.summary)


@bp.get("/metrics")
def metrics() -> Response:
    return Response(services().model_manager.metrics.render(), content_type=CONTENT_TYPE_LATEST)
