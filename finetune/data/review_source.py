"""Where a table of reviews comes from: a file, a gallery's address, or its database."""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.data.apply_reviews import ReviewTable
from models.artifacts.reviews import COLUMNS, Review, write_reviews
from models.errors import DataError

KEY_VARIABLE = "REVIEWS_KEY"
TIMEOUT_S = 60
# The driver that is installed; SQLAlchemy's own choice for PostgreSQL is another.
DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
QUERY = f"SELECT {', '.join(COLUMNS)} FROM current_reviews ORDER BY photo, sha256"


def load_reviews(config: Config, *, saved: Path | None = None) -> ReviewTable | None:
    """The reviews that the settings name, or None. A run that goes on has ``saved`` what it fetched. Raises DataError."""
    if config.reviews:
        return read_review_file(config.reviews)
    if config.reviews_from is None:
        return None
    return read_review_file(saved) if saved and saved.is_file() else fetch_reviews(config.reviews_from)


def read_review_file(path: Path) -> ReviewTable:
    """The reviews in a file. Raises DataError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"The reviews {path} cannot be read ({error.strerror}); give the reviews.csv of a gallery.") from None
    return ReviewTable.parse(data, origin=path.name)


def fetch_reviews(source: str) -> ReviewTable:
    """The reviews at an http(s) address, or in a database by its SQLAlchemy URL. Raises DataError; no password is printed."""
    if source.startswith(("http://", "https://")):
        return ReviewTable.parse(_download(source), origin=hide_password(source))
    if "://" not in source:
        raise DataError(
            f"--reviews-from is {source!r}; give an address (https://...), or a database (sqlite:///FILE, postgresql://...), "
            f"or a file with --reviews."
        )
    return ReviewTable.parse(_query(source), origin=hide_password(source))


def hide_password(source: str) -> str:
    """The source without what only its owner should know: its password and its query."""
    return re.sub(r"(?<=://)([^:/@]*):.*@", r"\1:***@", source).partition("?")[0]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the key is for the host that was named."""

    def redirect_request(self, *args: Any, **more: Any) -> None:
        return None


def _download(url: str) -> bytes:
    key = os.environ.get(KEY_VARIABLE)
    request = urllib.request.Request(url, headers={"Accept": "text/csv"} | ({"X-API-Key": key} if key else {}))
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT_S) as answer:
            data: bytes = answer.read()
            return data
    except urllib.error.HTTPError as error:
        hint = f"put the gallery's key into {KEY_VARIABLE}" if error.code in (401, 403) else "name the gallery's reviews.csv"
        raise DataError(f"{hide_password(url)} answered {error.code} {error.reason}; {hint}.") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())[:160]
        raise DataError(f"{hide_password(url)} cannot be reached ({reason}); name the gallery's reviews.csv.") from None


def _query(source: str) -> bytes:
    import sqlalchemy

    try:
        url = sqlalchemy.engine.make_url(source)
        url = url.set(drivername=DRIVERS.get(url.drivername, url.drivername))
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise DataError(f"There is no database {url.database}; name the gallery's with --reviews-from sqlite:///FILE.")
        engine = sqlalchemy.create_engine(url)
        try:
            with engine.connect() as connection:
                rows = connection.execute(sqlalchemy.text(QUERY)).all()
        finally:
            engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())[:200]
        raise DataError(
            f"The reviews cannot be read from {hide_password(source)} ({reason}); name the database of a gallery."
        ) from None
    return write_reviews(Review(*(_text(value) for value in row)) for row in rows)


def _text(value: Any) -> str:
    return "" if value is None else value.isoformat() if isinstance(value, datetime) else str(value)
