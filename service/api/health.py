"""Liveness, readiness and metrics."""

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
    """Report whether predictions are served. The gallery has a status of its own, as predictions do not wait for it."""
    model, gallery = services().model_manager.check_ready(), services().gallery
    return jsonify(status="ready", model=model.summary, gallery=gallery.status if gallery else "starting")


@bp.get("/metrics")
def metrics() -> Response:
    return Response(services().model_manager.metrics.render(), content_type=CONTENT_TYPE_LATEST)
