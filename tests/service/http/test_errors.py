"""Error codes, and how an exception of the domain becomes an error response."""

from __future__ import annotations

import pytest
from flask import Blueprint, Flask

from models.errors import BundleError, ImageError, TooComplexError, UnsupportedImageError
from service.app import _App
from service.http.errors import CODES, PROBLEM_TYPES, Problem, problem_from
from service.images.source_folder import ImageMissingError, ImageReplacedError, ImageUnavailableError


class StorageError(Exception):
    """An exception of the domain, which does not know HTTP."""


class StorageLockedError(StorageError):
    """A subclass without a code of its own."""


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODES, StorageError, ("database_unavailable", 5))


def test_titles_are_short_and_advice_is_a_sentence() -> None:
    for code, problem in PROBLEM_TYPES.items():
        assert 1 <= len(problem.title.split()) <= 3, code
        assert not problem.title.endswith("."), code
        assert problem.advice.endswith("."), code
        assert 400 <= problem.status < 600, code
    titles = [problem.title for problem in PROBLEM_TYPES.values()]
    assert len(set(titles)) == len(titles)


def test_codes_are_ordered_by_status() -> None:
    statuses = [problem.status for problem in PROBLEM_TYPES.values()]
    assert statuses == sorted(statuses)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ImageError("cut short"), "damaged_image"),
        (UnsupportedImageError("a text"), "not_an_image"),
        (TooComplexError("scans", "6,000 scans"), "image_too_complex"),
        (ImageUnavailableError("300 MiB"), "too_many_pixels"),
        (ImageMissingError("no cat.1.jpg"), "image_missing"),
        (ImageReplacedError("another cat.1.jpg"), "image_replaced"),
    ],
)
def test_an_exception_of_the_domain_has_the_code_of_its_class(error: Exception, code: str) -> None:
    problem = problem_from(error)
    assert problem is not None
    assert (problem.code, problem.detail, problem.headers) == (code, str(error), {})


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("error", [StorageError("locked"), StorageLockedError("locked")])
def test_a_code_holds_for_subclasses_and_sets_retry_after(error: StorageError) -> None:
    problem = problem_from(error)
    assert problem is not None
    assert (problem.code, problem.status, problem.detail) == ("database_unavailable", 503, "locked")
    assert problem.headers == {"Retry-After": "5"}


def test_a_problem_stays_the_same_and_other_exceptions_have_none() -> None:
    problem = Problem("not_found", "Page not found.")
    assert problem_from(problem) is problem
    assert problem_from(BundleError("a bug here")) is None
    assert problem_from(KeyError("a bug")) is None


def test_every_code_of_an_exception_is_known() -> None:
    assert {code for code, _ in CODES.values()} <= PROBLEM_TYPES.keys()


@pytest.fixture
def app(registered: None) -> Flask:
    app = _App("app")
    pages = Blueprint("pages", "pages")

    @app.get("/json")
    def json() -> str:
        raise StorageLockedError("locked")

    @pages.get("/page")
    def page() -> str:
        raise StorageLockedError("locked")

    @pages.errorhandler(Problem)
    def show(problem: Problem) -> tuple[str, int]:
        return f"page: {problem.detail}", problem.status

    @app.errorhandler(Problem)
    def respond(problem: Problem) -> tuple[str, int]:
        return f"json: {problem.detail}", problem.status

    app.register_blueprint(pages)
    return app


def test_the_application_hands_exceptions_of_the_domain_to_the_handlers_of_problems(app: Flask) -> None:
    client = app.test_client()
    assert (client.get("/json").status_code, client.get("/json").text) == (503, "json: locked")
    assert (client.get("/page").status_code, client.get("/page").text) == (503, "page: locked")
