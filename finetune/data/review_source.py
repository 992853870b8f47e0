"""Load reviews from a CSV file, a gallery's URL or its database."""

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
# psycopg 3 is installed; SQLAlchemy's default driver for PostgreSQL is psycopg2.
DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_URL_HINT = "Use the URL of the gallery's reviews.csv"
QUERY = f"SELECT {', '.join(COLUMNS)} FROM current_reviews ORDER BY photo, sha256"


def load_reviews(config: Config, *, saved: Path | None = None) -> ReviewTable | None:
    """Load the reviews of ``--reviews`` or ``--reviews-from``.

    Args:
        config: The training settings.
        saved: File in which a resumed run saved the reviews that it had fetched.

    Returns:
        The reviews, or None if the settings name none.

    Raises:
        DataError: The reviews cannot be read.
    """
    if config.reviews:
        return read_review_file(config.reviews)
    if config.reviews_from is None:
        return None
    return read_review_file(saved) if saved and saved.is_file() else fetch_reviews(config.reviews_from)


def read_review_file(path: Path) -> ReviewTable:
    """Read reviews from a CSV file. Raises DataError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read the reviews {path} ({error.strerror}). Use the reviews.csv of a gallery.") from None
    return ReviewTable.parse(data, origin=path.name)


def fetch_reviews(source: str) -> ReviewTable:
    """Fetch reviews from an http(s) URL or a database (SQLAlchemy URL). Raises DataError, without passwords in the text."""
    if source.startswith(("http://", "https://")):
        return ReviewTable.parse(_download(source), origin=hide_password(source))
    if "://" not in source:
        raise DataError(
            f"--reviews-from must be a URL (https://...) or a database (sqlite:///FILE, postgresql://...), got {source!r}. "
            f"For a file use --reviews."
        )
    return ReviewTable.parse(_query(source), origin=hide_password(source))


def hide_password(source: str) -> str:
    """Remove the password and the query string from a URL."""
    return re.sub(r"(?<=://)([^:/@]*):.*@", r"\1:***@", source).partition("?")[0]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Do not follow redirects, as the API key is meant for the given host only."""

    def redirect_request(self, *args: Any, **more: Any) -> None:
        return None


def _download(url: str) -> bytes:
    key = os.environ.get(KEY_VARIABLE)
    request = urllib.request.Request(url, headers={"Accept": "text/csv"} | ({"X-API-Key": key} if key else {}))
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT_S) as response:
            data: bytes = response.read()
            return data
    except urllib.error.HTTPError as error:
        hint = f"Set {KEY_VARIABLE} to the gallery's API key" if error.code in (401, 403) else _URL_HINT
        raise DataError(f"{hide_password(url)} returned {error.code} {error.reason}. {hint}.") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())[:160]
        raise DataError(f"Cannot reach {hide_password(url)} ({reason}). {_URL_HINT}.") from None


def _query(source: str) -> bytes:
    import sqlalchemy

    try:
        url = sqlalchemy.engine.make_url(source)
        url = url.set(drivername=DRIVERS.get(url.drivername, url.drivername))
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise DataError(f"No such database: {url.database}. Use --reviews-from sqlite:///FILE with the gallery's database.")
        engine = sqlalchemy.create_engine(url)
        try:
            with engine.connect() as connection:
                rows = connection.execute(sqlalchemy.text(QUERY)).all()
        finally:
            engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())[:200]
        raise DataError(
            f"Cannot read reviews from {hide_password(source)} ({reason}). Use the database of a gallery."
        ) from None
    return write_reviews(Review(*(_text(value) for value in row)) for row in rows)


def _text(value: Any) -> str:
    return "" if value is None else value.isoformat() if isinstance(value, datetime) else str(value)
