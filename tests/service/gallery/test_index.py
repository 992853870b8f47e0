"""The gallery's index keeps trying to import a model until its database can be opened."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import service.gallery.index
from models.artifacts.bundle import open_bundle
from models.errors import ConfigError
from service.db.connection import Database
from service.db.errors import DatabaseUnavailableError
from service.db.filter import Filter
from service.db.query import PredictionQuery
from service.gallery.index import FAILED, GalleryIndex
from service.settings import Settings
from tests.helpers.server import poll

pytestmark = pytest.mark.slow


def test_a_failed_import_is_retried_until_the_database_is_there(
    tiny_bundle: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_available, attempts = threading.Event(), []

    def connect(url: str, **options: Any) -> Database:
        attempts.append(url)
        if not is_available.is_set():
            raise ConfigError("DATABASE_URL cannot be opened.")
        return Database(url, **options)

    monkeypatch.setattr(service.gallery.index, "Database", connect)
    monkeypatch.setattr(service.gallery.index, "RETRY_S", 0.01)
    url = f"sqlite:///{tmp_path}/reviews.db"
    index = GalleryIndex(Settings(database_url=url))
    callbacks: list[Any] = []
    index.follow(SimpleNamespace(add_install_callback=callbacks.append))  # type: ignore[arg-type]
    assert index.status == "starting"
    bundle = open_bundle(tiny_bundle.path)
    (install,) = callbacks
    install(SimpleNamespace(bundle=bundle))
    poll(lambda: len(attempts) >= 3)
    assert index.status == "unavailable"
    with pytest.raises(DatabaseUnavailableError, match="keeps trying") as caught:
        _ = index.database
    assert str(caught.value) == FAILED
    is_available.set()
    poll(lambda: index.status == "ready")
    with index.database.read() as connection:
        assert PredictionQuery(connection, Filter(model=bundle.version)).counts.total == 18
    index.database.close()
