"""The gallery's index: the review database, and the evaluations that were imported into it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from models.artifacts.bundle import MANIFEST, Bundle, open_bundle
from models.artifacts.evaluation import BUNDLE_KIND, OUT_OF_FOLD, PredictionSource, open_predictions
from models.artifacts.label_issues import find_label_issues
from models.artifacts.paths import default_data_dir, resolve_bundle
from models.artifacts.predictions import Predictions
from models.artifacts.similarity import SimilarityIndex
from models.errors import UserError
from service.db.connection import Database
from service.db.errors import DatabaseUnavailableError, RecordNotFoundError
from service.db.filter import COLLAPSE, Filter
from service.db.ingest import EvaluationTable, get_or_create_model, import_predictions, is_imported, mark_model_active
from service.db.query import list_models
from service.db.records import ModelRecord
from service.http.errors import Problem
from service.inference.model_manager import LoadedModel, ModelManager
from service.settings import Settings

log = logging.getLogger("service.gallery")
RETRY_S = 10.0  # pause after a failed import
FAILED = "The gallery could not open its database. The server's log has the reason, and it keeps trying."


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """The embeddings of an evaluation as points of a plane."""

    source: PredictionSource
    table: SimilarityIndex

    @property
    def name(self) -> str:
        """The version of the evaluation."""
        return self.source.version

    @property
    def title(self) -> str:
        if self.source.folds:
            return "Out-of-fold predictions"
        return "Validation photos" if self.source.kind == BUNDLE_KIND else f"Evaluation of {self.source.split}"


class GalleryIndex:
    """The database, and what else is known of each model's photos. There is one for the application.

    A failure is reported on the gallery's pages and never stops a prediction.

    Args:
        settings: The settings.
        database: The open database, if there is one already.
    """

    def __init__(self, settings: Settings, database: Database | None = None) -> None:
        self._settings = settings
        self._database = database
        self._has_failed = False
        self._lock = threading.Lock()
        self._sources: dict[str, list[PredictionSource]] = {}  # by the version of the bundle
        self._similarity: dict[str, SimilarityIndex] = {}
        self._runs: dict[tuple[Path, int], Path | None] = {}  # bundle of a run of the studio, and its time -> its data folder
        self._merged_versions: dict[str, str] = {}  # version of a head-only bundle -> version of the bundle merged from it
        self.active_version: str | None = None

    @property
    def database(self) -> Database:
        """The open database. Raises Problem or DatabaseUnavailableError while there is none."""
        if self._database is not None and self.active_version is not None:
            return self._database
        if self._has_failed:
            raise DatabaseUnavailableError(FAILED)
        raise Problem("not_ready", "The gallery is loading. Retry in a second.", headers={"Retry-After": "1"})

    @property
    def status(self) -> str:
        """What readiness reports: ``ready``, ``starting`` or ``unavailable``."""
        if self._database is not None and self.active_version is not None:
            return "ready"
        return "unavailable" if self._has_failed else "starting"

    def follow(self, models: ModelManager) -> None:
        """Import every model that goes live, in a thread, so that neither predictions nor rollouts wait for the database."""
        installed: queue.SimpleQueue[LoadedModel] = queue.SimpleQueue()
        models.add_install_callback(installed.put)

        def run() -> None:
            model = installed.get()
            while True:
                is_imported = self.import_model(model)
                with contextlib.suppress(queue.Empty):
                    model = installed.get(timeout=None if is_imported else RETRY_S)

        threading.Thread(target=run, name="gallery", daemon=True).start()

    def import_model(self, model: LoadedModel) -> bool:
        """Import the predictions of the active model and of EVALUATIONS. Returns whether the database took them."""
        with self._lock:
            try:
                if self._database is None:
                    url = self._settings.database_url or f"sqlite:///{default_data_dir() / 'reviews.db'}"
                    self._database = Database(url, timeout_s=self._settings.database_timeout_s)
                self._merged_versions |= _merged(model.bundle)
                paths = [self._resolve_evaluation(path) for path in self._settings.evaluations]
                for path in (model.bundle.path, *filter(None, paths)):
                    self._import(self._database, path)
                self._register(self._database, model)
            except UserError as error:
                log.error("%s", error)
            except Exception:
                log.exception("the gallery could not import %s", model.bundle.path)
            else:
                self.active_version = model.bundle.version
                return True
            self._has_failed = True
            return False

    def models(self, connection: Connection) -> list[ModelRecord]:
        """List the models, most recently active first, without head-only bundles whose merged bundle is known."""
        return [model for model in list_models(connection) if model.version not in self._merged_versions]

    def similarity_tables(self, version: str) -> list[SimilarityIndex]:
        """Load the embeddings and near duplicates of a model's evaluations that are on this machine."""
        tables = []
        for source in self._sources_of(version):
            if source.version not in self._similarity:
                self._similarity[source.version] = source.similarity()
            tables.append(self._similarity[source.version])
        return tables

    def maps(self, version: str) -> list[EmbeddingMap]:
        """List the maps of a model's evaluations that are on this machine. Each has axes of its own."""
        tables = zip(self._sources.get(version, []), self.similarity_tables(version), strict=True)
        return [EmbeddingMap(source, table) for source, table in tables if len(table.embeddings)]

    def select_sha256s(self, filters: Filter) -> list[Collection[str]]:
        """Return the photos of the parts of a filter that the database cannot answer (see ``PhotoSelector``).

        Raises:
            RecordNotFoundError: The photo or the map of the filter is in no evaluation on this machine.
        """
        selected: list[Collection[str]] = []
        tables = self.similarity_tables(filters.model)
        if filters.similar:
            table = next((table for table in tables if filters.similar in table.row_by_sha256), None)
            if table is None or not len(table.embeddings):
                raise RecordNotFoundError("The photo has no embedding in an evaluation on this machine.")
            rows = table.similar_to(table.row_by_sha256[filters.similar], filters.min_similarity / 100)
            selected.append({table.sha256s[row] for row in rows})
        if filters.duplicates and filters.duplicates != COLLAPSE:
            same = {other.sha256 for table in tables for other in table.duplicates_of(filters.duplicates)}
            selected.append(same | {filters.duplicates})
        if filters.region:
            name, *points = filters.region.split(":")
            known = {one.name: one.table for one in self.maps(filters.model)}
            if name not in known:
                raise RecordNotFoundError(f"The map {name} is of no evaluation on this machine.")
            pairs = [tuple(map(int, point.split(","))) for point in points]
            selected.append({known[name].sha256s[row] for row in known[name].inside([(x, y) for x, y in pairs])})
        return selected

    def duplicate_groups(self, version: str) -> Mapping[str, int]:
        """Return the group of near duplicates of each photo of a model that has one, by sha256."""
        groups: dict[str, int] = {}
        for table in self.similarity_tables(version):
            offset = max(groups.values(), default=0)
            groups |= {sha256: offset + group for sha256, group in table.groups.items() if sha256 not in groups}
        return groups

    def merged_from(self, version: str) -> str | None:
        """Return the version of the head-only bundle that a model was merged from."""
        return next((head for head, merged in self._merged_versions.items() if merged == version), None)

    def bundle_path(self, version: str) -> Path | None:
        """Return the folder of a bundle if it is on this machine."""
        return {source.kind: source.path for source in self._sources_of(version)}.get("bundle")

    def data_folders(self) -> list[Path]:
        """Return the folders of evaluated photos: DATA_DIR, and in the studio those of its datasets and runs."""
        folders = [self._settings.data_dir] if self._settings.data_dir else []
        if self._settings.studio:
            self._find_runs()
            datasets = self._settings.resolved_studio_dir / "datasets"
            folders += [path for path in sorted(datasets.glob("*")) if path.is_dir()]
            folders += [path for path in list(self._runs.values()) if path and path.parent != datasets.resolve()]
        return list(dict.fromkeys(folders))

    def add(self, path: Path) -> None:
        """Import the predictions of a bundle into the database given to the constructor. Raises DatabaseUnavailableError."""
        assert self._database is not None
        self._merged_versions |= _merged(open_bundle(path, files=()))
        self._import(self._database, path)

    def _sources_of(self, version: str) -> list[PredictionSource]:
        if version not in self._sources and self._settings.studio:
            self._find_runs()
        return [source for source in self._sources.get(version, []) if source.path.is_dir()]

    def _find_runs(self) -> None:
        """Read the bundles of the studio's runs that are new since the last call. Their predictions are imported already."""
        for manifest in (self._settings.resolved_studio_dir / "runs").glob(f"*/bundle/{MANIFEST}"):
            try:
                run = manifest.parent, manifest.stat().st_mtime_ns
                if run in self._runs:
                    continue
                self._runs[run] = None
                bundle = open_bundle(resolve_bundle(manifest.parent), files=())
                self._merged_versions |= _merged(bundle)
                self._runs[run] = _data_dir_of(manifest.parents[1] / "config.yaml")
                self._add_source(open_predictions(bundle.path))
            except (UserError, OSError) as error:  # OSError: deleted meanwhile
                log.warning("%s", error)

    def _add_source(self, source: PredictionSource) -> PredictionSource:
        """Remember where the predictions of a model are on this machine."""
        version = self._merged_versions.get(source.bundle_version, source.bundle_version)
        source = dataclasses.replace(source, bundle_version=version)
        known = self._sources.setdefault(version, [])
        if all(other.version != source.version for other in known):
            known.append(source)
        return source

    def _resolve_evaluation(self, path: Path) -> Path | None:
        """Return what to import for a path of EVALUATIONS: the merged bundle for a head-only one, None if that is imported."""
        with contextlib.suppress(UserError):  # reported when the path is imported
            if (path / MANIFEST).is_file() and (bundle := open_bundle(path, files=())).is_head_only:
                if bundle.version in self._merged_versions:
                    return None
                path = resolve_bundle(path)
                self._merged_versions |= _merged(open_bundle(path, files=()))
        return path

    def _import(self, database: Database, path: Path) -> None:
        """Import the predictions of a bundle or an evaluation once. An invalid one is logged and skipped."""
        try:
            source = self._add_source(open_predictions(path))
            version = source.bundle_version
            with database.read() as connection:
                if is_imported(connection, version, source.version):
                    return
            table = _evaluation_table(source)
        except DatabaseUnavailableError:
            raise
        except UserError as error:
            log.warning("%s", error)
            return
        try:
            with database.write(background=True) as connection:
                if is_imported(connection, version, source.version):  # by another worker in the meantime
                    return
                model_id = get_or_create_model(connection, version=version, name=source.name, classes=source.classes)
                images = import_predictions(connection, model_id, table)
        except IntegrityError:
            log.info("imported by another process", extra={"version": source.version})
            return
        database.refresh_statistics()
        log.info("imported", extra={"model": source.name, "version": version, "images": images})

    def _register(self, database: Database, model: LoadedModel) -> None:
        """Insert the active model, even if its bundle has no predictions: production predictions may follow."""
        bundle = model.bundle
        with database.write(background=True) as connection:
            model_id = get_or_create_model(connection, version=bundle.version, name=bundle.name, classes=bundle.classes)
            mark_model_active(connection, model_id)


def _data_dir_of(config: Path) -> Path | None:
    """Return the data folder of a run, which its bundle does not contain."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("data_dir"):
            return Path(values["data_dir"])
    return None


def _merged(bundle: Bundle) -> dict[str, str]:
    return {bundle.merged_from: bundle.version} if bundle.merged_from else {}


def _unlike(predictions: Predictions, max_ood_score: float | None) -> NDArray[np.bool_]:
    if predictions.ood_scores is None or max_ood_score is None:
        return np.zeros(len(predictions.labels), np.bool_)
    return np.asarray(predictions.ood_scores > max_ood_score)


def _evaluation_table(source: PredictionSource) -> EvaluationTable:
    predictions = source.predictions()
    similarity = source.similarity()
    duplicate = [
        len({other.label for other in similarity.duplicates_of(sha256)} | {predictions.classes[label]}) > 1
        for sha256, label in zip(predictions.sha256s, predictions.labels, strict=True)
    ]
    return EvaluationTable(
        source=OUT_OF_FOLD if source.folds else "evaluation",
        digest=source.version,
        predictions=predictions,
        duplicate=np.array(duplicate, dtype=np.bool_),
        mislabeled=find_label_issues(predictions),
        unlike=_unlike(predictions, source.max_ood_score),
    )
