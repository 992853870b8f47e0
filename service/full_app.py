"""The application with all its pages: the one that programs ask, and where people look."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace

from flask import Flask

from service.app import create_api_app
from service.context import Services
from service.gallery import compare, export, grid, image_routes, photo, review
from service.gallery.image_access import ImageAccess
from service.gallery.index import GalleryIndex
from service.gallery.recorder import PredictionRecorder
from service.inference.model_manager import LoadedModel
from service.inference.predictor import Predictor
from service.web import api_docs, layout, upload_page


def create_full_app(services: Services) -> Flask:
    """Wire the rooms together."""
    settings, models = services.settings, services.model_manager
    gallery = GalleryIndex(settings)
    services = replace(services, gallery=gallery, image_access=ImageAccess(settings, gallery, models.decoder))
    if settings.save_predictions:
        services.recorder = PredictionRecorder(gallery, settings, models.metrics)
        services.predictor = Predictor(settings, models, services.admission, on_prediction=services.recorder.record)
    app = create_api_app(services)
    for part in (layout.bp, upload_page.bp, api_docs.bp):
        app.register_blueprint(part)
    for part in (grid.bp, photo.bp, export.bp, image_routes.bp, review.bp, compare.bp, compare.json_bp):
        app.register_blueprint(part)
    installed: queue.SimpleQueue[LoadedModel] = queue.SimpleQueue()
    models.add_install_callback(installed.put)
    threading.Thread(target=_show_gallery, args=(gallery, installed), name="gallery", daemon=True).start()
    return app


def _show_gallery(gallery: GalleryIndex, models: queue.SimpleQueue[LoadedModel]) -> None:
    """The gallery comes after the model: who asks for a prediction does not wait for it, and neither does the next bundle."""
    while True:
        gallery.import_model(models.get())
