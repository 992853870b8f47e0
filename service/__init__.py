"""Serve a bundle over HTTP: ``create_app`` is the only place that wires the rooms together. No work at import."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from service.settings import Settings


def create_app(settings: Settings | None = None) -> Flask:
    """Build the application and start to load the model behind it; ``settings`` come from the environment if not given.

    Answers at once; ``/health/ready`` tells when the model is there.
    """
    from service.settings import Settings

    settings = settings or Settings.from_environment()
    from service.model import ServedModel

    model = ServedModel.start(settings)  # before Flask is imported: the two take their time side by side
    from service.app import build_app

    app = build_app(settings, model)
    app.extensions["swapper"].watch()
    return app
