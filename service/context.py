"""Typed access to the components registered on the Flask application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from service.gallery.image_routes import ImageAccess
    from service.gallery.index import GalleryIndex
    from service.gallery.recorder import PredictionRecorder
    from service.http.admission import AdmissionController
    from service.http.middleware import RequestMiddleware
    from service.inference.model_manager import ModelManager
    from service.inference.predictor import Predictor
    from service.rollout.rollout import RolloutManager
    from service.settings import Settings
    from service.studio.workspace import Workspace

EXTENSION = "services"


@dataclass
class Services:
    """The components of one application.

    ``gallery`` and ``image_access`` exist in an application with pages only, and ``workspace`` only if the studio is on.
    """

    settings: Settings
    model_manager: ModelManager
    admission: AdmissionController
    rollout: RolloutManager
    predictor: Predictor
    middleware: RequestMiddleware | None = None
    gallery: GalleryIndex | None = None
    image_access: ImageAccess | None = None
    recorder: PredictionRecorder | None = None
    workspace: Workspace | None = None


class HasExtensions(Protocol):
    """A Flask application, or an object that stands in for one."""

    @property
    def extensions(self) -> dict[str, Any]: ...


def services_of(app: HasExtensions) -> Services:
    """Return the components of an application."""
    return cast("Services", app.extensions[EXTENSION])


def services() -> Services:
    """Return the components of the application that handles the current request."""
    from flask import current_app  # gunicorn's parent process imports this module and has no use for Flask

    return services_of(current_app)


def gallery() -> GalleryIndex:
    """Return the gallery of the application that handles the current request."""
    found = services().gallery
    assert found is not None, "a page route in an application without pages"
    return found


def image_access() -> ImageAccess:
    """Return the image access of the application that handles the current request."""
    found = services().image_access
    assert found is not None, "a page route in an application without pages"
    return found


def workspace() -> Workspace:
    """Return the studio's folder of the application that handles the current request."""
    found = services().workspace
    assert found is not None, "a studio route in an application without the studio"
    return found
