"""The gallery's state: the database, opened beside the loading model, and the evaluations that were read into it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from pathlib import Path

import numpy as np
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from models.artifacts.bundle import MANIFEST, Bundle, open_bundle
from models.artifacts.evaluation import OUT_OF_FOLD, PredictionSource, open_predictions
from models.artifacts.label_issues import find_label_issues
from models.artifacts.paths import default_data_dir, resolve_bundle
from models.artifacts.similarity import SimilarityIndex
from models.errors import UserError
from service.db.connection import Database
from service.db.ingest import EvaluationTable, get_or_create_model, import_predictions, is_imported, mark_model_active
from service.db.query import ModelRecord, list_models
from service.http.errors import Problem
from service.inference.model_manager import LoadedModel
from service.settings import Settings

log = logging.getLogger("service.gallery")


class GalleryIndex:
    """The database and what is known of each model's photos beside it. One for the application; until it is there,
    ``database`` says so. What fails here is told on the gallery's pages and never stops a prediction."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database: Database | None = None
        self._error: str | None = None
        self._lock = threading.Lock()
        self._results: dict[str, list[PredictionSource]] = {}  # by the version of the bundle that they are of
        self._lookalikes: dict[str, SimilarityIndex] = {}
        self._wholes: dict[str, str] = {}  # a head-only bundle's version -> that of the whole one, which stands for both
        self.active_version: str | None = None

    @property
    def database(self) -> Database:
        """Raises Problem while there is none."""
        if self._database is not None and self.active_version is not None:
            return self._database
        if self._error is not None:
            raise Problem("database_unavailable", self._error)
        raise Problem("not_ready", "The gallery is being prepared; ask again in a second.", headers={"Retry-After": "1"})

    @property
    def status(self) -> str:
        """What readiness reports: ``ready``, ``starting`` or ``unavailable``."""
        if self._database is not None and self.active_version is not None:
            return "ready"
        return "starting" if self._error is None else "unavailable"

    def import_model(self, model: LoadedModel) -> None:
        """Read the predictions of the model that serves now, and those of EVALUATIONS, and show them."""
        with self._lock:
            try:
                if self._database is None:
                    self._database = Database(self._settings.database_url or _default_url())
                self._wholes |= _merged(model.bundle)
                paths = [self._whole(path) for path in self._settings.evaluations]
                for path in (model.bundle.path, *filter(None, paths)):
                    self._take(path)
                self._know(model)
            except UserError as error:
                self._fail(str(error))
            except Exception as error:
                log.exception("the gallery cannot be shown")
                self._fail(f"The gallery's database failed ({error!r}); look into the log, and start again.")
            else:
                self.active_version = model.bundle.version

    def models(self, connection: Connection) -> list[ModelRecord]:
        """The models that the database knows, the one seen last first; each once, also one that serves joined with its base."""
        return [model for model in list_models(connection) if model.version not in self._wholes]

    def similarity_tables(self, version: str) -> list[SimilarityIndex]:
        """The embeddings and duplicates of a model's evaluations, as far as they are on this machine."""
        found = []
        for results in self._results.get(version, []):
            if results.version not in self._lookalikes:
                self._lookalikes[results.version] = results.similarity()
            found.append(self._lookalikes[results.version])
        return found

    def merged_from(self, version: str) -> str | None:
        """The version of the head-only bundle that a model was merged from, as far as that is known here."""
        return next((head for head, whole in self._wholes.items() if whole == version), None)

    def bundle_path(self, version: str) -> Path | None:
        """Where the bundle of a version is on this machine, if it is."""
        kinds = {results.kind: results.path for results in self._results.get(version, [])}
        return kinds.get("bundle")

    def _whole(self, path: Path) -> Path | None:
        """What to read in place of a path of EVALUATIONS: the whole bundle for a head-only one, nothing where that is read."""
        with contextlib.suppress(UserError):  # said when the path itself is read
            if (path / MANIFEST).is_file() and (bundle := open_bundle(path, files=())).is_head_only:
                if bundle.version in self._wholes:
                    return None
                path = resolve_bundle(path)
                self._wholes |= _merged(open_bundle(path, files=()))
        return path

    def _take(self, path: Path) -> None:
        """Import a bundle's or an evaluation's predictions, if that was not done; one that is broken is logged and left out."""
        assert self._database is not None
        try:
            results = open_predictions(path)
            version = self._wholes.get(results.bundle_version, results.bundle_version)
            results = dataclasses.replace(results, bundle_version=version)
            of_model = self._results.setdefault(results.bundle_version, [])
            if all(known.version != results.version for known in of_model):
                of_model.append(results)
            with self._database.read() as connection:
                if is_imported(connection, results.bundle_version, results.version):
                    return
            table = _table(results)
        except UserError as error:
            log.warning("%s", error)
            return
        try:
            with self._database.write() as connection:
                if is_imported(connection, results.bundle_version, results.version):  # by another worker, meanwhile
                    return
                model_id = get_or_create_model(
                    connection, version=results.bundle_version, name=results.name, classes=results.classes
                )
                photos = import_predictions(connection, model_id, table)
        except IntegrityError:
            log.info("imported by another process", extra={"version": results.version})
            return
        self._database.refresh_statistics()
        log.info("imported", extra={"model": results.name, "version": results.bundle_version, "images": photos})

    def _know(self, model: LoadedModel) -> None:
        """Enter the model that serves, also one whose bundle has no predictions: live ones may come."""
        assert self._database is not None
        bundle = model.bundle
        with self._database.write() as connection:
            model_id = get_or_create_model(connection, version=bundle.version, name=bundle.name, classes=bundle.classes)
            mark_model_active(connection, model_id)

    def _fail(self, reason: str) -> None:
        self._error = reason
        log.error(reason)


def _merged(bundle: Bundle) -> dict[str, str]:
    return {bundle.merged_from: bundle.version} if bundle.merged_from else {}


def _table(results: PredictionSource) -> EvaluationTable:
    predictions = results.predictions()
    lookalikes = results.similarity()
    duplicate = [
        len({other.label for other in lookalikes.duplicates_of(sha256)} | {predictions.classes[label]}) > 1
        for sha256, label in zip(predictions.sha256s, predictions.labels, strict=True)
    ]
    return EvaluationTable(
        source="out-of-fold" if results.kind == OUT_OF_FOLD else "evaluation",
        digest=results.version,
        predictions=predictions,
        duplicate=np.array(duplicate, dtype=np.bool_),
        mislabeled=find_label_issues(predictions),
    )


def _default_url() -> str:
    return f"sqlite:///{default_data_dir() / 'reviews.db'}"
