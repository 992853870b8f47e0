"""Serve a bundle over HTTP. No work at import."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from service.context import Services
    from service.deferred_app import DeferredApp
    from service.settings import Settings


def create_app(settings: Settings | None = None) -> Flask:
    """Build the application and start to load the model behind it; ``settings`` come from the environment if not given.

    Answers at once; ``/health/ready`` tells when the model is there.
    """
    from service.settings import Settings

    core = _core(settings or Settings.from_environment())
    from service.full_app import create_full_app

    return create_full_app(core)


def create_wsgi_app() -> DeferredApp | Flask:
    """What gunicorn runs: as ``create_app``, but photos are answered before the pages are there, unless they are to be kept."""
    from service.settings import Settings

    settings = Settings.from_environment()
    if settings.save_predictions:
        return create_app(settings)
    core = _core(settings)
    from service.deferred_app import DeferredApp

    return DeferredApp(core)


def _core(settings: Settings) -> Services:
    from service.inference.model_manager import ModelManager

    model = ModelManager.start(settings)  # before Flask is imported: the two take their time side by side
    from service.app import create_services

    core = create_services(settings, model)
    core.rollout.start()
    return core
