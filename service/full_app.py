"""The application with all its pages: the one that programs ask, and where people look."""

from __future__ import annotations

import queue
import threading

from flask import Flask

from service.app import Services, create_api_app
from service.gallery import compare, export, grid, image_routes, photo, review
from service.gallery.image_access import ImageAccess
from service.gallery.index import GalleryIndex
from service.gallery.recorder import PredictionRecorder
from service.inference.model_manager import LoadedModel
from service.web import api_docs, layout, upload_page


def create_full_app(services: Services) -> Flask:
    """Wire the rooms together."""
    gallery = GalleryIndex(services.settings)
    recorder = (
        PredictionRecorder(gallery, services.settings, services.model_manager.metrics)
        if services.settings.save_predictions
        else None
    )
    app = create_api_app(services, on_prediction=recorder.record if recorder else None)
    image_access = ImageAccess(services.settings, gallery, services.model_manager.decoder)
    app.extensions.update(gallery=gallery, image_access=image_access, recorder=recorder)
    for part in (layout.bp, upload_page.bp, api_docs.bp):
        app.register_blueprint(part)
    for part in (grid.bp, photo.bp, export.bp, image_routes.bp, review.bp, compare.bp, compare.json_bp):
        app.register_blueprint(part)
    models: queue.SimpleQueue[LoadedModel] = queue.SimpleQueue()
    services.model_manager.add_install_callback(models.put)
    threading.Thread(target=_show_gallery, args=(gallery, models), name="gallery", daemon=True).start()
    return app


def _show_gallery(gallery: GalleryIndex, models: queue.SimpleQueue[LoadedModel]) -> None:
    """The gallery comes after the model: who asks for a prediction does not wait for it, and neither does the next bundle."""
    while True:
        gallery.import_model(models.get())
