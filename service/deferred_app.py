"""The first second of a server: photos are answered as soon as the model is there, before the pages are."""

from __future__ import annotations

import gc
import logging
import os
import re
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from flask import Flask

from service.app import create_api_app
from service.context import Services
from service.http.middleware import normalize_path

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger("service")
API_PATHS = re.compile(r"/(predict|models|metrics|health/.*|v2|v2/.*|admin/.*)")
MODEL_WAIT_S = 2.0  # one that takes longer to load is not waited for: the pages say so


class DeferredApp:
    """A WSGI application: the one for programs at once, and the whole one when it is there, for everybody.

    What the pages need, SQLAlchemy most of all, takes as long to import as a model to load, and the two fight for Python's
    lock. So it is imported when the model is ready; who asks for a page before waits for it.
    """

    def __init__(self, core: Services) -> None:
        self._api = create_api_app(core)
        self._whole: Future[Flask] = Future()
        threading.Thread(target=self._build, args=(core,), name="opening", daemon=True).start()

    @property
    def extensions(self) -> dict[str, Any]:
        """Flask's own, of the application that answers now."""
        return (self._whole.result() if self._whole.done() else self._api).extensions

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        normalize_path(environ)
        is_early = not self._whole.done() and API_PATHS.fullmatch(environ["PATH_INFO"])
        return (self._api if is_early else self._whole.result())(environ, start_response)

    def _build(self, core: Services) -> None:
        core.model_manager.loaded.wait(MODEL_WAIT_S)
        try:
            from service.full_app import create_full_app

            self._whole.set_result(create_full_app(core))
            gc.freeze()
        except BaseException:  # a server without its pages is none
            log.exception("the pages could not be built")
            from gunicorn.arbiter import Arbiter

            os._exit(Arbiter.WORKER_BOOT_ERROR)
