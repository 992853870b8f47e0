"""The page of a photo, and reviews over HTTP: forms, JSON, keys, other sites, deleted photos and a killed server."""

from __future__ import annotations

import csv
import html
import http.client
import io
import json
import os
import re
import shutil
import signal
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from models.artifacts.atomic_io import sha256_of
from tests.helpers.server import RESPONSE_TIMEOUT_S, Response, Server, poll, serve
from tests.helpers.tiny_network import finetune, paint, registered, save_weights

pytestmark = pytest.mark.slow

BROWSER = {"Sec-Fetch-Site": "same-origin"}
Row = dict[str, Any]


@pytest.fixture(scope="module")
def data(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the data folder, in which tests delete photos."""
    folder = tmp_path_factory.mktemp("review") / "data"
    shutil.copytree(tiny_bundle.data, folder)
    return folder


@pytest.fixture(scope="module")
def server(tiny_bundle: SimpleNamespace, data: Path) -> Iterator[Server]:
    url = f"sqlite:///{data.parent / 'reviews.db'}"
    with serve(tiny_bundle.path, data_dir=data, database_url=url, save_predictions=1) as server:
        _wait(server)
        yield server


def _wait(server: Server) -> None:
    poll(lambda: server.get("/gallery/photos.json").status == 200)


def rows(server: Server, **query: str) -> list[Row]:
    found: list[Row] = server.get(f"/gallery/photos.json?{urlencode(query)}").json()["rows"]
    return found


@pytest.fixture
def row(server: Server) -> Row:
    """A photo without a review."""
    found = rows(server, source="evaluation", review="unreviewed", sort="name")
    return next(row for row in found if not past(server, row))


def page_of(row: Row, **query: str) -> str:
    return f"/gallery/photo?{urlencode(query | {'photo': row['photo'], 'sha256': row['sha256']})}"


def post(
    server: Server, row: Row, decision: str, *, as_json: bool = False, headers: dict[str, str] | None = None, **fields: str
) -> Response:
    given = {"photo": row["photo"], "sha256": row["sha256"], "decision": decision} | fields
    body, kind = (json.dumps(given), "json") if as_json else (urlencode(given), "x-www-form-urlencoded")
    headers = {"Content-Type": f"application/{kind}"} | (BROWSER if headers is None else headers)
    return server.request("POST", "/gallery/review", body.encode(), headers=headers)


def text(reply: Response) -> str:
    assert reply.headers["Content-Type"].startswith("text/html")
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", reply.body.decode())).split())


def way(reply: Response) -> tuple[str, dict[str, str]]:
    """Return the path and the query that a form leads to."""
    assert reply.status == 303, reply.body.decode()
    address = urlsplit(reply.headers["Location"])
    return address.path, {name: values[-1] for name, values in parse_qs(address.query).items()}


def past(server: Server, row: Row) -> list[Row]:
    found: list[Row] = server.get(f"/gallery/history.json?sha256={row['sha256']}").json()["history"]
    return found


def reviews_of(server: Server) -> dict[str, dict[str, str]]:
    table = csv.DictReader(io.StringIO(server.get("/gallery/reviews.csv").body.decode(), newline=""))
    return {line["sha256"]: line for line in table}


# Reading


def test_the_page_shows_the_facts_of_a_photo(server: Server) -> None:
    row = rows(server, sort="name", review="unreviewed")[0]
    reply = server.get(page_of(row, sort="name", review="unreviewed"))
    message = text(reply)
    left = rows(server, sort="name", review="unreviewed")
    assert f"1 of {len(left)}" in message
    assert f": {len(left)} photos, not reviewed, by name" in message
    for fact in (row["photo"], row["sha256"], row["label"], row["predicted"], f"{row['loss']:.4f}"):
        assert fact in message
    assert f'rel="next" href="/gallery/photo?model={_version(server)}' in reply.body.decode()
    assert 'rel="prev"' not in reply.body.decode()
    assert "No reviews yet." in message
    for picture in re.findall(r'<img [^>]*src="([^"]+)"', reply.body.decode()):
        poll(lambda picture=picture: server.get(html.unescape(picture)).status == 200)  # type: ignore[misc]


def _version(server: Server) -> str:
    version: str = server.get("/models").json()["models"][0]["version"]
    return version


def explained(server: Server, row: Row) -> Response | None:
    """Return the page once it shows the heat map, which is computed with a low priority."""
    reply = server.get(page_of(row, explain=row["predicted"]))
    return reply if re.search("Brighter areas|No region supports", text(reply)) else None


def test_the_heatmap_is_shown_by_a_link_with_its_method(server: Server, row: Row) -> None:
    reply = poll(lambda: explained(server, row))
    picture = html.unescape(re.search(r'src="([^"]+heatmap.png[^"]+)"', reply.body.decode())[1])  # type: ignore[index]
    assert server.get(picture).headers["Content-Type"] == "image/png"
    rejected = server.get(page_of(row, explain="no such class"))
    assert (rejected.status, "The classes of the model are" in text(rejected)) == (400, True)


def test_a_similar_photo_with_another_label_or_an_incorrect_prediction_is_marked(server: Server) -> None:
    kinds = set()
    for row in rows(server, source="evaluation", sort="margin")[:8]:
        body = server.get(page_of(row)).body.decode()
        for alike in re.findall(r'<li class="similar">.*?</li>', body, re.DOTALL):
            message = " ".join(re.sub(r"<[^>]*>", " ", alike).split())
            label, predicted = re.search(r"Label (\w+).*Predicted (\w+)", message).groups()  # type: ignore[union-attr]
            kind = label != row["label"], predicted != label
            assert ("other label" in message, "incorrect" in message) == kind
            assert ('class="differs"' in alike, 'class="mistake"' in alike) == kind
            kinds.add(kind)
    assert {(False, False), (True, False)} <= kinds


def test_no_url_refers_to_a_file_outside_the_data_folder(server: Server, data: Path) -> None:
    secret = paint(data.parent / "secret.jpg", (1, 2, 3), seed=5)
    (data / "valid" / "red" / "link.jpg").symlink_to(secret)
    for photo in ("../secret.jpg", str(secret), "valid/red/link.jpg", "valid/../../secret.jpg", "", "\0", "valid/red"):
        for kind in ("thumbnail.jpg", "original.jpg", "crop.png"):
            query = urlencode({"photo": photo, "model": _version(server)})
            reply = server.get(f"/gallery/images/{sha256_of(secret)}/{kind}?{query}")
            assert (reply.status, reply.code) == ((400, "bad_parameter") if photo == "\0" else (404, "image_missing")), photo


def test_a_missing_or_replaced_photo_is_reported_and_not_shown(server: Server, data: Path) -> None:
    missing, replaced = rows(server, source="evaluation", review="unreviewed", sort="name", order="desc")[:2]
    (data / missing["photo"]).unlink()
    paint(data / replaced["photo"], (9, 9, 9), seed=77)
    for row, words, code in (
        (missing, "is not in the data folder", 404),
        (replaced, "was changed or replaced", 409),
    ):
        reply = server.get(page_of(row, explain=row["predicted"]))
        assert (reply.status, words in text(reply)) == (200, True)
        assert not re.search(rf'src="/gallery/images/{row["sha256"]}', reply.body.decode())
        assert server.get(f"/gallery/images/{row['sha256']}/original.jpg?photo={row['photo']}").status == code


# Deciding


def test_a_form_saves_and_leads_to_the_next_photo_with_an_undo(server: Server) -> None:
    filter_ = {"source": "evaluation", "review": "unreviewed", "sort": "name"}
    first, second, third = rows(server, **filter_)[:3]
    reply = post(
        server, first, f"label:{first['label']}", advance="1", filter=urlencode(filter_), reviewer="Ada", note="a\r\nb"
    )
    path, query = way(reply)
    assert (path, query["photo"], query["review"]) == ("/gallery/photo", second["photo"], "unreviewed")
    cookies = reply.headers.get_all("Set-Cookie")
    assert any(cookie.startswith("reviewer=Ada;") for cookie in cookies)
    assert all("HttpOnly" in cookie and "SameSite=Strict" in cookie for cookie in cookies)
    message = server.get(reply.headers["Location"])
    assert f"Saved: {Path(first['photo']).name}, confirmed {first['label']}." in text(message)
    assert f'name="expected_version" value="{query["saved"]}"' in message.body.decode()
    [entry] = past(server, first)
    assert (entry["decision"], entry["new_label"], entry["note"], entry["reviewer"]) == ("label", first["label"], "a\nb", "Ada")
    path, query = way(post(server, second, "bad", advance="1", filter=urlencode(filter_)))
    assert query["photo"] == third["photo"]
    path, query = way(post(server, third, "neither", filter=urlencode(filter_)))
    assert query["photo"] == third["photo"]  # no next photo was requested
    assert "Anonymous marked as none of the classes." in text(server.get(f"{path}?{urlencode(query)}"))
    path, query = way(post(server, third, "undo", expected_version=query["saved"], advance="1", filter=urlencode(filter_)))
    assert query["photo"] == third["photo"]  # who undoes wants to see it
    message = text(server.get(f"{path}?{urlencode(query)}"))
    assert f"Undone: {Path(third['photo']).name}, review removed; label is {third['label']}." in message
    assert "Not reviewed yet." in message
    assert [entry["decision"] for entry in past(server, third)] == ["undo", "neither"]
    assert third["sha256"] not in reviews_of(server)


def test_a_card_shows_the_review(server: Server) -> None:
    row = next(row for row in rows(server, source="evaluation", sort="margin")[:8] if row["review"] == "unreviewed")
    other = next(name for name in row["probabilities"] if name != row["label"])
    name = re.escape(Path(row["photo"]).name)
    outcome = "Correct" if row["label"] == row["predicted"] else "Incorrect"
    version = ""
    for decision, state, badge in (
        (f"label:{other}", "Pending", f"Relabeled to {other}"),
        (f"label:{row['label']}", outcome, "Confirmed"),
        ("neither", "Excluded", "None of the classes"),
        ("bad", "Excluded", "Excluded"),
        ("undo", "Excluded", "None of the classes"),  # which was decided before it
    ):
        version = str(post(server, row, decision, as_json=True, expected_version=version).json()["id"])
        grid = server.get("/gallery/photos?sort=margin").body.decode()
        card = re.search(rf'<li class="tile[^>]*>\s*<a[^>]*{name}.*?</dl>.*?(?=<li class="tile|</ol>)', grid, re.DOTALL)
        assert card
        marks = re.findall(r'class="(?:outcome-mark \w+|badge reviewed)"><svg.*?</svg>(.*?)</(?:li|span)>', card[0])
        assert [re.sub(r"<[^>]*>", "", mark).strip() for mark in marks] == [state, badge]


def test_the_end_of_a_filter_is_reported(server: Server) -> None:
    filter_ = {"source": "evaluation", "review": "unreviewed", "sort": "name"}
    left = rows(server, **filter_)
    reply = post(server, left[-1], "bad", advance="1", filter=urlencode(filter_))
    _, query = way(reply)
    assert (query["photo"], query["last"]) == (left[-1]["photo"], "1")
    message = text(server.get(reply.headers["Location"]))
    assert f"Last photo in this view. Next unreviewed ({len(left) - 1})" in message
    assert "no longer matches this filter" in message


def test_a_json_response_has_the_history_and_the_next_photo(server: Server, row: Row) -> None:
    other = next(name for name in row["probabilities"] if name != row["label"])
    answer = post(server, row, "label", new_label=other, as_json=True, headers={}).json()
    assert answer["next"] is None
    assert answer["history"] == past(server, row)
    assert answer["history"][0]["id"] == answer["id"]
    assert reviews_of(server)[row["sha256"]]["new_label"] == other


def test_a_conflicting_decision_is_shown_and_the_note_is_kept(server: Server, row: Row) -> None:
    first = post(server, row, "bad", as_json=True, reviewer="Ann").json()["id"]
    fields = {"note": 'My <b>"own"</b> note', "reviewer": "Ben", "filter": "sort=name", "advance": "1"}
    reply = post(server, row, f"label:{row['label']}", **fields)
    assert reply.status == 409
    message, body = text(reply), reply.body.decode()
    assert "Ann has just excluded the photo. Check it, then overwrite it if needed." in message
    assert f"Overwrite with {row['label']}" in message
    assert "My &lt;b&gt;&#34;own&#34;&lt;/b&gt; note</textarea>" in body
    assert 'value="Ben"' in body
    seen = re.search(r'id="version".*?name="expected_version" value="(\d+)"', body, re.DOTALL)[1]  # type: ignore[index]
    assert int(seen) == first
    way(post(server, row, f"label:{row['label']}", expected_version=seen, **fields))
    assert [entry["decision"] for entry in past(server, row)] == ["label", "bad"]
    assert post(server, row, "undo", as_json=True, expected_version=seen).code == "review_conflict"


def test_an_undo_restores_the_previous_decision_and_the_page_reports_it(server: Server, row: Row) -> None:
    _, query = way(post(server, row, "bad", reviewer="Ann"))
    _, query = way(post(server, row, "neither", reviewer="Ben", expected_version=query["saved"]))
    path, query = way(post(server, row, "undo", reviewer="Cid", expected_version=query["saved"]))
    message = text(server.get(f"{path}?{urlencode(query)}"))
    assert f"Undone: {Path(row['photo']).name}, previous review restored: Ann excluded the photo." in message
    seen = str(past(server, row)[-1]["id"])
    post(server, row, f"label:{row['label']}", as_json=True, expected_version=seen)
    assert "Undone" not in text(server.get(f"{path}?{urlencode(query)}"))  # another decision was made since


def test_a_note_changes_no_decision_and_requires_text(server: Server, row: Row) -> None:
    path, query = way(post(server, row, "note", note="Is it a toy?"))
    message = text(server.get(f"{path}?{urlencode(query)}"))
    assert f"Note saved: {Path(row['photo']).name}" in message
    assert (reviews_of(server)[row["sha256"]]["decision"], reviews_of(server)[row["sha256"]]["note"]) == (
        "note",
        "Is it a toy?",
    )
    assert past(server, row)[0]["note"] == "Is it a toy?"
    assert post(server, row, "undo", as_json=True).code == "nothing_to_undo"
    rejected = post(server, row, "note", note="  ")
    assert (rejected.status, "Enter a note, or choose a decision." in text(rejected)) == (400, True)


@pytest.mark.parametrize(
    ("decision", "fields", "message"),
    [
        ("label:wolf", {}, "Valid values: blue, green, red."),
        ("maybe", {}, "Valid values: label, neither, bad, note, undo."),
        ("bad", {"note": "x" * 2_001}, "The limit is 2,000."),
        ("bad", {"reviewer": "x" * 81}, "The limit is 80."),
        ("bad", {"expected_version": "-1"}, "must be the id of the current decision, or empty"),
        ("bad", {"filter": "sort=colour"}, "Invalid `sort`: 'colour'"),
        ("bad", {"more": "1"}, "Unknown field 'more'."),
        ("bad", {"sha256": "0" * 64}, "has no prediction for a photo"),
        ("bad", {"sha256": ""}, "The field `sha256` is required."),
        ("bad", {"note": "x" * 70_000}, "Shorten the text."),
    ],
)
def test_a_rejection_is_a_page_for_browsers_and_a_problem_for_programs(
    server: Server, row: Row, decision: str, fields: dict[str, str], message: str
) -> None:
    page = post(server, row, decision, **fields)
    assert page.status >= 400
    assert message.replace("`", "") in text(page)  # where it is shown as code
    if "more" not in fields and len(fields.get("note", "")) < 60_000:
        program = post(server, row, decision, as_json=True, **({"advance": "1"} | fields))
        assert (program.status, program.headers["Content-Type"]) == (page.status, "application/problem+json")
        assert message in program.json()["detail"]
    assert past(server, row) == []


def test_a_cross_site_request_is_rejected(server: Server, row: Row) -> None:
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://evil.example"}):
        reply = post(server, row, "bad", headers=headers)
        assert (reply.status, "Use the gallery pages or a non-browser client" in text(reply)) == (403, True)
        assert post(server, row, "bad", headers=headers, as_json=True).code == "cross_site_request"
        assert server.post(b"key=x", "application/x-www-form-urlencoded", path="/gallery/key", headers=headers).status == 403
    assert past(server, row) == []


def test_with_keys_anyone_may_read_but_a_decision_requires_a_key(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'keyed.db'}"
    with serve(tiny_bundle.path, data_dir=tiny_bundle.data, database_url=url, api_keys="ann:sesame,ben:open") as keyed:
        _wait(keyed)
        row = rows(keyed)[0]
        page = keyed.get(page_of(row))
        assert "Sign in with a key to review." in text(page)
        assert 'action="/gallery/review"' not in page.body.decode()
        rejected = post(keyed, row, "bad", note="kept")
        assert (rejected.status, "Your note: kept" in text(rejected)) == (401, True)
        assert post(keyed, row, "bad", as_json=True, headers={"X-API-Key": "guess"}).code == "unauthorized"
        form, kind = {"key": "guess", "back": page_of(row)}, "application/x-www-form-urlencoded"
        wrong = keyed.post(urlencode(form).encode(), kind, path="/gallery/key", headers=BROWSER)
        assert (wrong.status, "Unknown API key." in text(wrong)) == (401, True)
        assert "Set-Cookie" not in wrong.headers
        right = keyed.post(urlencode(form | {"key": "sesame"}).encode(), kind, path="/gallery/key", headers=BROWSER)
        assert (right.status, right.headers["Location"]) == (303, page_of(row))
        cookie = right.headers["Set-Cookie"]
        assert "; HttpOnly" in cookie
        assert "; SameSite=Strict" in cookie
        away = form | {"key": "sesame", "back": "//evil.example/"}
        gone = keyed.post(urlencode(away).encode(), kind, path="/gallery/key", headers=BROWSER)
        assert gone.headers["Location"] == "/gallery"
        mine = {"Cookie": cookie.partition(";")[0]}
        assert "Reviewing as ann." in text(keyed.get(page_of(row), headers=mine))
        way(post(keyed, row, "bad", headers=BROWSER | mine, reviewer="Another Reviewer"))
        assert past(keyed, row)[0]["reviewer"] == "ann"
        assert (
            post(keyed, row, "undo", as_json=True, expected_version="1", headers={"Authorization": "Bearer open"}).status == 200
        )
        assert past(keyed, row)[0]["reviewer"] == "ben"


# Photos from production


def test_a_production_photo_names_the_evaluated_one_with_the_same_bytes(server: Server, data: Path) -> None:
    evaluated = next(row for row in rows(server, source="evaluation", sort="name") if (data / row["photo"]).is_file())
    assert server.post((data / evaluated["photo"]).read_bytes()).status == 200
    sent = poll(lambda: [row for row in rows(server, source="production") if row["sha256"] == evaluated["sha256"]])
    page = text(server.get(page_of(sent[0])))
    label = evaluated["label"]
    note = f"Labeled {label} as {evaluated['photo']} (same photo, one review applies to all copies)."
    assert page.count(note) == 2  # panel and bar


# Live photos, and a server that dies


def test_production_photos_are_labeled_and_trained_on_and_survive_a_kill(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'live.db'}"
    settings = {"data_dir": tiny_bundle.data, "database_url": url, "save_predictions": 1}
    with serve(tiny_bundle.path, **settings) as server:
        _wait(server)
        for number in range(4):
            assert server.post(paint(tmp_path / "sent.jpg", (255, 40, 40), seed=900 + number).read_bytes()).status == 200
        live = poll(lambda: (found := rows(server, source="production", sort="name")) and len(found) == 4 and found)
        page = text(server.get(page_of(live[0], source="production")))
        for words in ("No label", "What is it?", "unlabeled"):
            assert words in page
        way(post(server, live[0], "label:red", advance="1", filter="source=production&sort=name"))
        way(post(server, live[1], "label:blue"))
        assert "labeled red" in text(server.get(page_of(live[0])))
        archive = server.get("/gallery/production.zip").body
        acknowledged = _decide_until_killed(server)
    with serve(tiny_bundle.path, max_saved=3, **settings) as server:
        _wait(server)
        kept = reviews_of(server)
        assert acknowledged
        for sha256, (decision, id_) in acknowledged.items():
            assert kept[sha256]["decision"] == decision
            assert any(entry["id"] == id_ for entry in past(server, {"sha256": sha256}))
        assert server.post(paint(tmp_path / "sent.jpg", (255, 40, 40), seed=990).read_bytes()).status == 200
        poll(lambda: len(rows(server, source="production")) == 3)
        assert {live[0]["sha256"], live[1]["sha256"]} <= {row["sha256"] for row in rows(server, source="production")}
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        packed.extractall(folder)
    names = {path.parent.name: sha256_of(path) for path in (folder / "production" / "train").rglob("*.jpg")}
    assert names == {"red": live[0]["sha256"], "blue": live[1]["sha256"]}
    with registered():
        flags = ("--backbone", "tiny", "--weights", save_weights(tmp_path / "tiny.pth"), "--output-dir", tmp_path / "run")
        code, message, failed = finetune("train", "--data-dir", tiny_bundle.data, *flags, "--extra-data", folder / "production")
    assert code == 0, failed
    assert "train: blue 13, green 12, red 13" in message


def _decide_until_killed(server: Server) -> dict[str, tuple[str, int]]:
    """Save decisions with two clients while every process of the server is killed. Returns the acknowledged ones."""
    photos = rows(server, source="evaluation")
    acknowledged: dict[str, tuple[str, int]] = {}
    enough = threading.Event()

    def client(mine: list[Row]) -> None:
        for row in mine:
            try:
                reply = post(server, row, "bad", as_json=True)
            except (OSError, http.client.HTTPException):  # it may break off in the middle of an answer
                return
            if reply.status == 200:
                acknowledged[row["sha256"]] = ("bad", reply.json()["id"])
            if len(acknowledged) >= 4:
                enough.set()

    clients = [threading.Thread(target=client, args=(photos[start::2],)) for start in (0, 1)]
    for thread in clients:
        thread.start()
    assert enough.wait(RESPONSE_TIMEOUT_S)
    os.killpg(server.pid, signal.SIGKILL)
    for thread in clients:
        thread.join(RESPONSE_TIMEOUT_S)
    return acknowledged
