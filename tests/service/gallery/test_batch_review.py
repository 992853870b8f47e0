"""Reviewing many photos over HTTP: the form of the grid, its question, JSON, conflicts, limits and keys."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from tests.helpers.server import Response, Server, poll, serve

pytestmark = pytest.mark.slow

BROWSER = {"Sec-Fetch-Site": "same-origin"}
UNREVIEWED = {"source": "evaluation", "review": "unreviewed", "sort": "name"}
Row = dict[str, Any]


@pytest.fixture(scope="module")
def server(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    url = f"sqlite:///{tmp_path_factory.mktemp('batch') / 'reviews.db'}"
    with serve(tiny_bundle.path, data_dir=tiny_bundle.data, database_url=url, max_selected=17) as server:
        poll(lambda: server.get("/gallery/photos.json").status == 200)
        yield server


@pytest.fixture
def photos(server: Server) -> list[Row]:
    """All photos, without a review."""
    reviewed = [row for row in rows(server) if row["review"] != "unreviewed"]
    while reviewed:
        for row in reviewed:
            version = str(row["decision"]["id"])
            review(server, row, "undo", expected_version=version)
        reviewed = [row for row in rows(server) if row["review"] != "unreviewed"]
    return rows(server, **UNREVIEWED)


def rows(server: Server, **query: str) -> list[Row]:
    return list(listing(server, **query)["rows"])


def listing(server: Server, **query: str) -> Row:
    found: Row = server.get(f"/gallery/photos.json?{urlencode(query)}").json()
    return found


def review(server: Server, row: Row, decision: str, **fields: str) -> Response:
    body = {"photo": row["photo"], "sha256": row["sha256"], "decision": decision} | fields
    return server.request("POST", "/gallery/review", json.dumps(body).encode(), headers={"Content-Type": "application/json"})


def send(server: Server, body: dict[str, Any], **headers: str) -> Response:
    headers = {"Content-Type": "application/json"} | headers
    return server.request("POST", "/gallery/reviews", json.dumps(body).encode(), headers=headers)


def submit(server: Server, fields: list[tuple[str, str]], headers: dict[str, str] = BROWSER) -> Response:
    headers = {"Content-Type": "application/x-www-form-urlencoded"} | headers
    return server.request("POST", "/gallery/reviews", urlencode(fields).encode(), headers=headers)


def named(row: Row) -> Row:
    return {"photo": row["photo"], "sha256": row["sha256"], "expected_version": row["decision"] and row["decision"]["id"]}


def text(reply: Response) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", reply.body.decode())).split())


def form_of(reply: Response, *, take: int | None = None) -> list[tuple[str, str]]:
    """Return the fields of the grid's form: the hidden ones, and the first ``take`` checkboxes or the checked ones."""
    body = reply.body.decode()
    form = re.search(r'<form class="batch-bar".*?</form>', body, re.DOTALL)
    assert form
    hidden = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form[0])
    boxes = re.findall(r'<input type="checkbox" name="select" form="batch" value="([^"]*)" autocomplete="off"( checked)?', body)
    chosen = [value for value, checked in boxes if checked] if take is None else [value for value, _ in boxes[:take]]
    return [(name, html.unescape(value)) for name, value in [*hidden, *(("select", value) for value in chosen)]]


def followed(server: Server, reply: Response) -> tuple[Response, dict[str, str]]:
    """Follow the redirect of a form. Returns the page, and the query of its address."""
    assert reply.status == 303, text(reply)
    address = reply.headers["Location"]
    return server.get(address), {name: values[-1] for name, values in parse_qs(urlsplit(address).query).items()}


def status(reply: Response) -> str:
    found = re.search(r'<p class="batch-status".*?</p>', reply.body.decode(), re.DOTALL)
    assert found
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", found[0])).split())


def test_the_form_reviews_the_selected_photos_and_undoes_them(server: Server, photos: list[Row]) -> None:
    grid = server.get(f"/gallery/photos?{urlencode(UNREVIEWED)}")
    page, query = followed(server, submit(server, [*form_of(grid, take=3), ("decision", "label:green")]))
    assert query.items() >= {"review": "unreviewed", "sort": "name"}.items()
    assert status(page) == "Labeled 3 photos green."
    decided = {row["sha256"]: row["decision"] for row in rows(server) if row["decision"]}
    assert {sha256: decision["new_label"] for sha256, decision in decided.items()} == {
        row["sha256"]: "green" for row in photos[:3]
    }
    page, _ = followed(server, submit(server, [*form_of(page, take=0), ("decision", "undo")]))
    assert status(page) == "Undone for 3 photos."
    assert "data-undo" in page.body.decode()
    assert not re.search('name="batch"', page.body.decode())  # an undo is not undone
    assert [row for row in rows(server) if row["decision"]] == []


def test_a_page_is_selected_by_a_link_and_the_class_by_a_list(server: Server, photos: list[Row]) -> None:
    grid = server.get(f"/gallery/photos?{urlencode(UNREVIEWED)}&select=page")
    fields = form_of(grid)
    assert sum(name == "select" for name, _ in fields) == len(photos)
    assert submit(server, [*fields, ("decision", "bad")]).status == 413  # 18 photos, and the limit is 17
    few = [field for field in fields if field[0] != "select"] + [field for field in fields if field[0] == "select"][:2]
    page, _ = followed(server, submit(server, [*few, ("decision", "label"), ("new_label", "red")]))
    assert status(page) == "Labeled 2 photos red."


def test_all_photos_of_a_filter_need_an_answer_to_a_question(server: Server, photos: list[Row]) -> None:
    label = photos[0]["label"]
    query = urlencode({"class": label, "sort": "name"})
    grid = server.get(f"/gallery/photos?{query}&select=all")
    matching = rows(server, **{"class": label})
    assert status(grid) == f"All {len(matching)} photos selected."
    boxes = re.findall(r'name="select" form="batch"[^>]*>', grid.body.decode())
    assert all("checked disabled" in box for box in boxes)
    question = submit(server, [*form_of(grid), ("decision", "neither")])
    assert question.status == 200
    assert f"Mark {len(matching)} photos as none of the classes?" in text(question)
    assert [row for row in rows(server) if row["decision"]] == []
    assert review(server, matching[0], "bad").status == 200
    fields = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', question.body.decode())
    page, query_of_page = followed(server, submit(server, [(name, html.unescape(value)) for name, value in fields]))
    assert status(page) == (
        f"Marked {len(matching) - 1} photos as none of the classes. "
        f"1 of {len(matching)} was reviewed by someone else in the meantime and left as it is."
    )
    assert query_of_page["class"] == label
    assert {row["review"] for row in rows(server, **{"class": label})} == {"bad", "neither"}


def test_photos_that_someone_else_reviewed_stay_selected(server: Server, photos: list[Row]) -> None:
    grid = server.get(f"/gallery/photos?{urlencode({'source': 'evaluation', 'sort': 'name'})}")
    newer = review(server, photos[1], "bad", reviewer="Ben").json()["id"]
    page, query = followed(server, submit(server, [*form_of(grid, take=4), ("decision", "keep")]))
    assert status(page) == (
        "Confirmed the label of 3 photos. 1 of 4 was reviewed by someone else in the meantime and left as it is."
    )
    assert [value for name, value in form_of(page) if name == "select"] == [
        f"{newer}:{photos[1]['sha256']}:{photos[1]['photo']}"
    ]
    assert query["left"] == "reviewed:1"
    page, _ = followed(server, submit(server, [*form_of(page), ("decision", "keep")]))  # seen now
    assert status(page) == "Confirmed the label of 1 photo."


def test_programs_send_json(server: Server, photos: list[Row]) -> None:
    reply = send(server, {"decision": "predicted", "photos": [named(row) for row in photos[:5]], "reviewer": "Ann"}).json()
    assert (reply["saved"], reply["left"]) == (5, [])
    found = {row["sha256"]: row for row in rows(server)}
    assert all(found[row["sha256"]]["decision"]["new_label"] == row["predicted"] for row in photos[:5])
    again = send(server, {"decision": "bad", "photos": [named(row) for row in photos[4:6]]}).json()
    version = found[photos[4]["sha256"]]["decision"]["id"]
    left = {"photo": photos[4]["photo"], "sha256": photos[4]["sha256"], "reason": "reviewed", "version": version}
    assert (again["saved"], again["left"]) == (1, [left])
    undone = send(server, {"decision": "undo", "batch": reply["batch"]}).json()
    assert (undone["saved"], undone["message"]) == (5, "Undone for 5 photos.")
    assert send(server, {"decision": "undo", "batch": reply["batch"]}).code == "nothing_to_undo"


def test_a_filter_is_reviewed_with_the_count_and_the_version_that_the_program_saw(server: Server, photos: list[Row]) -> None:
    query = {"class": photos[0]["label"], "review": "unreviewed"}
    seen = listing(server, **query)
    body = {"decision": "keep", "filter": urlencode(query), "total": seen["total"], "view": seen["view"]}
    assert send(server, body | {"total": seen["total"] - 1}).code == "review_conflict"
    assert review(server, seen["rows"][0], "bad").status == 200
    reply = send(server, body).json()
    assert (reply["saved"], reply["left"]) == (seen["total"] - 1, [])
    assert reply["message"].endswith(f"1 of {seen['total']} was reviewed by someone else in the meantime and left as it is.")


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"decision": "bad", "photos": []}, "bad_parameter", "No photos are selected. Select at least one."),
        ({"decision": "bad"}, "bad_parameter", "Send either `photos`, or `filter` with `total`."),
        ({"decision": "bad", "filter": ""}, "bad_parameter", "The field `total` is required"),
        ({"decision": "bad", "filter": "", "total": True}, "bad_parameter", "`total` must be a whole number (got True)."),
        ({"decision": "bad", "filter": "sort=colour", "total": 1}, "bad_parameter", "Invalid `sort`: 'colour'"),
        ({"decision": "bad", "filter": "", "total": 18}, "selection_too_large", "18 photos are selected, the limit is 17."),
        (
            {"decision": "bad", "filter": "", "total": 1, "view": "x"},
            "bad_parameter",
            "`view` must be the version of a listing",
        ),
        ({"decision": "bad", "photos": [{"photo": "a"}]}, "bad_parameter", "An entry of `photos` is invalid"),
        ({"decision": "bad", "photos": [{}] * 200}, "bad_parameter", "An entry of `photos` is invalid"),
        ({"decision": "bad", "photos": [[]] * 2_000}, "json_too_large", "Select at most 17 photos."),
        ({"decision": "maybe", "photos": [{"photo": "a", "sha256": "b"}]}, "bad_parameter", "Valid values: keep, predicted"),
        ({"decision": "undo"}, "bad_parameter", "The field `batch` is required for an undo."),
        ({"decision": "bad", "more": 1}, "bad_parameter", "Unknown field 'more'."),
        ([], "bad_json", "The JSON is not an object."),
    ],
)
def test_an_invalid_request_states_what_is_wrong(server: Server, body: Any, code: str, message: str) -> None:
    reply = send(server, body)
    assert (reply.code, message in reply.json()["detail"]) == (code, True), reply.body


def test_a_form_without_a_decision_changes_nothing(server: Server, photos: list[Row]) -> None:
    """Enter on a checkbox clicks the first button of the form, which has no decision."""
    grid = server.get(f"/gallery/photos?{urlencode(UNREVIEWED)}")
    form = re.search(r'<form class="batch-bar".*?</form>', grid.body.decode(), re.DOTALL)
    assert form
    assert re.findall(r"<button[^>]*>", form[0])[0] == "<button hidden>"
    reply = submit(server, form_of(grid, take=2))
    assert (reply.status, "Choose what the selected photos show." in text(reply)) == (400, True)
    assert [row for row in rows(server) if row["decision"]] == []


def test_a_cross_site_form_is_rejected(server: Server, photos: list[Row]) -> None:
    fields = [("decision", "bad"), ("select", f":{photos[0]['sha256']}:{photos[0]['photo']}")]
    reply = submit(server, fields, {"Sec-Fetch-Site": "cross-site"})
    assert (reply.status, "Use the gallery pages or a non-browser client" in text(reply)) == (403, True)
    assert [row for row in rows(server) if row["decision"]] == []


def test_with_keys_the_grid_requires_one_before_it_reviews(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'reviews.db'}"
    with serve(tiny_bundle.path, data_dir=tiny_bundle.data, database_url=url, api_keys="ann:secret") as server:
        poll(lambda: server.get("/gallery/photos.json").status == 200)
        grid = server.get("/gallery/photos")
        assert status(grid) == "Sign in with a key to review."
        assert 'value="keep"' not in grid.body.decode()
        row = rows(server)[0]
        body = {"decision": "bad", "photos": [named(row)]}
        assert send(server, body).code == "unauthorized"
        assert submit(server, [("decision", "bad")]).status == 401
        assert send(server, body, Authorization="Bearer secret").json()["saved"] == 1
        assert rows(server, review="bad")[0]["decision"]["reviewer"] == "ann"
