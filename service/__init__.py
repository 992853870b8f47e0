"""Serve a bundle over HTTP. Importing the package does nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from service.app import DeferredApp
    from service.context import Services
    from service.settings import Settings


def create_app(settings: Settings | None = None) -> Flask:
    """Create the application and start to load its model in the background.

    Args:
        settings: Default: from the environment.

    Returns:
        The Flask application. ``/health/ready`` reports when the model is loaded.
    """
    from service.settings import Settings

    services = _start_services(settings or Settings.from_environment())
    from service.app import create_full_app

    return create_full_app(services)


def create_wsgi_app() -> DeferredApp | Flask:
    """Create the application for gunicorn, with settings from the environment.

    It predicts before its pages are built, unless predictions are saved, which needs the gallery's database.
    """
    from service.settings import process_settings

    services = _start_services(process_settings())
    from service.app import DeferredApp, create_full_app

    return create_full_app(services) if services.settings.save_predictions else DeferredApp(services)


def _start_services(settings: Settings) -> Services:
    from service.inference.model_manager import ModelManager
    from service.rollout.state import open_store

    store = open_store(settings)
    models = ModelManager.start(settings, bundles_to_load=store.bundles_to_load)  # in a thread, while this one imports Flask
    from service.app import create_services

    services = create_services(settings, models, store)
    services.rollout.start()
    return services
