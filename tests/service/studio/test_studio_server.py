"""The studio over HTTP: who may change something, uploads that are killed and resumed, zips, and the audit."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.server import Response, Server, multipart, poll, serve

pytestmark = pytest.mark.slow
HTML = {"Accept": "text/html,*/*;q=0.8"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def studio(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("studio")
    with serve(
        tiny_bundle.path, studio=1, studio_dir=folder, studio_min_free_mb=0, data_dir=tiny_bundle.data, max_body_mb=1
    ) as server:
        yield server


@pytest.fixture(scope="module")
def photos(tiny_bundle: SimpleNamespace) -> dict[str, bytes]:
    """Different photos by class and name."""
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in sorted(tiny_bundle.photos.glob("*/*"))}


def post_json(server: Server, path: str, body: Any) -> Response:
    return server.request("POST", path, json.dumps(body).encode(), headers=JSON)


def create(server: Server, name: str, **more: str) -> str:
    made = post_json(server, "/studio/datasets", {"name": name, **more})
    assert made.status == 201, made.body
    return f"/studio/datasets/{name}"


def finished(server: Server, data_set: str) -> dict[str, Any]:
    """Return the task of a dataset once it has ended."""

    def ended() -> dict[str, Any] | None:
        task: dict[str, Any] = server.get(f"{data_set}/files.json").json()["task"]
        return task if task["state"] != "running" else None

    return poll(ended, within_s=300) or {}


def classes(server: Server, data_set: str) -> dict[str, int]:
    found: dict[str, int] = server.get(f"{data_set}/files.json").json()["classes"]
    return found


def zipped(files: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return memory.getvalue()


def test_without_the_setting_there_is_no_studio(shared_server: Any) -> None:
    server = shared_server()
    assert server.get("/studio").status == 404
    assert server.request("POST", "/studio/datasets", b"name=x").status == 404
    assert b"Studio" not in server.get("/").body
    assert not [path for path in server.get("/openapi.json").json()["paths"] if path.startswith("/studio")]


def test_photos_are_uploaded_one_by_one_and_shown(studio: Server, photos: dict[str, bytes]) -> None:
    data_set = create(studio, "one by one")
    data_set = data_set.replace(" ", "%20")
    name, data = next(iter(photos.items()))
    first = studio.request("PUT", f"{data_set}/photos/{name}", data)
    assert (first.status, first.json()["photo"], first.json()["size"]) == (201, name, len(data))
    assert studio.request("PUT", f"{data_set}/photos/{name}", data).status == 200
    thumbnail = studio.get(f"{data_set}/photos/{name}")
    assert (thumbnail.status, thumbnail.headers["Content-Type"], thumbnail.body[:2]) == (200, "image/jpeg", b"\xff\xd8")
    page = studio.get(data_set, headers=HTML).body.decode()
    assert "1 photo in 1 class" in page
    assert f'href="{data_set}"' in studio.get("/studio", headers=HTML).body.decode()
    assert studio.request("DELETE", f"{data_set}/photos/{name}").status == 200
    assert studio.get(f"{data_set}/photos/{name}").code == "not_found"


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "empty_image"), (b"no photo", "not_an_image"), (b"\xff\xd8\xff" + bytes(1 << 20), "body_too_large")],
)
def test_a_file_that_predict_would_reject_is_not_added(studio: Server, data: bytes, code: str) -> None:
    data_set = create(studio, f"rejected-{code.replace('_', '-')}")
    assert studio.request("PUT", f"{data_set}/photos/cats/1.jpg", data).code == code
    assert classes(studio, data_set) == {}


def test_a_form_adds_photos_without_javascript(studio: Server, photos: dict[str, bytes]) -> None:
    data_set = create(studio, "form")
    files = [("file", name.rpartition("/")[2], data) for name, data in photos.items() if name.startswith("red/")]
    body, kind = multipart(("class", None, b"red"), *files)
    answer = studio.post(body, kind, path=f"{data_set}/photos", headers=HTML)
    assert (answer.status, answer.headers["Location"]) == (303, data_set)
    assert classes(studio, data_set) == {"red": len(files)}


def test_a_request_of_another_site_is_rejected(studio: Server) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = studio.request("POST", "/studio/datasets", b"name=evil", headers=headers)
        assert answer.code == "cross_site_request"
    assert "evil" not in str(studio.get("/studio/datasets.json").json())


def test_changes_need_a_key_if_there_are_keys(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    keys = {"api_keys": "ann:sesame", "admin_keys": "root:open"}
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    with serve(tiny_bundle.path, studio=1, studio_dir=tmp_path, **keys) as server:
        assert server.get("/studio", headers=HTML).status == 200
        for method, path in (
            ("POST", "/studio/datasets"),
            ("POST", "/studio/datasets/x/delete"),
            ("PUT", "/studio/datasets/x/photos/a/b"),
        ):
            assert server.request(method, path, b"name=x").code == "unauthorized"
        page = server.request("POST", "/studio/datasets", b"name=x", headers={**HTML, **form})
        assert page.status == 401
        assert b'name="key"' in page.body
        signed_in = server.request("POST", "/gallery/key", b"key=open&back=/studio", headers=form)
        assert (signed_in.status, signed_in.headers["Location"]) == (303, "/studio")
        cookie = {"Cookie": signed_in.headers["Set-Cookie"].partition(";")[0]}
        assert server.request("POST", "/studio/datasets", b"name=x", headers={**form, **cookie}).status == 201
        assert server.request("POST", "/studio/datasets", b"name=y", headers={**form, "X-API-Key": "sesame"}).status == 201
        assert server.request("POST", "/gallery/key", b"key=wrong&back=/studio", headers=form).status == 401


def test_an_upload_continues_after_the_server_was_killed(
    tiny_bundle: SimpleNamespace, tmp_path: Path, photos: dict[str, bytes]
) -> None:
    files = [[name, len(data)] for name, data in photos.items()]
    settings = {"studio": 1, "studio_dir": tmp_path, "studio_min_free_mb": 0}
    with serve(tiny_bundle.path, **settings) as server:
        data_set = create(server, "pets")
        plan = post_json(server, f"{data_set}/missing", {"files": files}).json()["missing"]
        assert len(plan) == len(photos)
        for row in plan[:5]:
            assert server.request("PUT", f"{data_set}/photos/{row['photo']}", photos[row["path"]]).status == 201
        for pid in [*server.workers(), server.pid]:
            os.kill(pid, signal.SIGKILL)
    (tmp_path / "datasets" / "pets" / "blue").mkdir(exist_ok=True)
    with serve(tiny_bundle.path, **settings) as server:
        left = post_json(server, f"{data_set}/missing", {"files": files}).json()
        assert (left["present"], len(left["missing"])) == (5, len(photos) - 5)
        for row in left["missing"]:
            assert server.request("PUT", f"{data_set}/photos/{row['photo']}", photos[row["path"]]).status == 201
        assert post_json(server, f"{data_set}/missing", {"files": files}).json()["missing"] == []
    saved = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in (tmp_path / "datasets" / "pets").glob("*/*")}
    assert saved == photos


def test_a_zip_is_sent_in_pieces_and_read_by_the_rules_of_training(studio: Server, photos: dict[str, bytes]) -> None:
    data_set = create(studio, "zip")
    data = zipped(
        {f"download/Training/{name}": data for name, data in photos.items()}
        | {f"download/val/{name}": data + b"\0" for name, data in photos.items()}
        | {"download/README.txt": b"hello", "__MACOSX/download/._x.jpg": b"x"}
    )
    half = len(data) // 2
    headers = {"Content-Type": "application/octet-stream"}
    url = f"{data_set}/archive?total={len(data)}&offset="
    assert studio.request("PUT", f"{url}0", data[:half], headers=headers).json()["received"] == half
    assert studio.get(f"{data_set}/archive").json() == {"received": half, "total": len(data)}
    problem = studio.request("PUT", f"{url}{half + 1}", data[half + 1 :], headers=headers)
    size = f"{len(data):,}"
    assert (problem.status, problem.json()["detail"]) == (
        409,
        f"Expected byte {half:,} of a zip of {size} bytes, got byte {half + 1:,} of {size}. Continue there, or start again with"
        " offset=0.",
    )
    assert studio.request("PUT", f"{url}{half}", data[half:], headers=headers).status == 202
    task = finished(studio, data_set)
    assert (task["state"], task["message"]) == ("done", f"{2 * len(photos)} photos were added.")
    listing = studio.get(f"{data_set}/files.json").json()["files"]
    assert {row["photo"].split("/")[0] for row in listing["red"]} == {"train", "valid"}
    assert set(listing) == {"blue", "green", "red", "unlabeled"}


def link(name: str) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    return memory.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK no zip", "is not a complete zip archive"),
        (zipped({"../cats/1.jpg": b"x"}), "points outside the target folder"),
        (link("cats/1.jpg"), "is a link or a device, not a file"),
        (
            zipped({"cats/1.jpg": bytes(20 << 20)}),
            "0 photos were added. 1 file was left out, such as 1.jpg",
        ),
        (zipped({"readme.txt": b"x"}), "No photos were found."),
    ],
)
def test_a_zip_that_is_unsafe_or_without_photos_adds_nothing(studio: Server, data: bytes, message: str, request: Any) -> None:
    data_set = create(studio, f"bad-{request.node.callspec.indices['data']}")
    assert studio.request("PUT", f"{data_set}/archive", data, headers={"Content-Type": "application/zip"}).status == 202
    assert message in finished(studio, data_set)["message"]
    assert sum(classes(studio, data_set).values()) == 0


def test_a_folder_of_the_server_is_copied(studio: Server, tiny_bundle: SimpleNamespace) -> None:
    data_set = create(studio, "server", source="folder", folder="valid")
    assert finished(studio, data_set)["state"] == "done"
    assert classes(studio, data_set) == {"blue": 6, "green": 6, "red": 6}
    assert len(list(tiny_bundle.photos.glob("*/*"))) == 18
    for folder in ("..", "/etc", "nothing"):
        assert (
            post_json(studio, "/studio/datasets", {"name": "no", "source": "folder", "folder": folder}).code == "bad_parameter"
        )
    assert "no" not in [row["name"] for row in studio.get("/studio/datasets.json").json()["datasets"]]


def test_the_audit_shows_copies_and_damaged_files_and_they_are_left_out(studio: Server, photos: dict[str, bytes]) -> None:
    data_set = create(studio, "audited")
    for name, data in photos.items():
        assert studio.request("PUT", f"{data_set}/photos/{name}", data).status == 201
    red = next(name for name in photos if name.startswith("red/"))
    studio.request("PUT", f"{data_set}/photos/blue/copy.jpg", photos[red])
    studio.request("PUT", f"{data_set}/photos/red/damaged.jpg", photos[red][:300])
    assert studio.request("POST", f"{data_set}/audit", b"").status == 202
    assert finished(studio, data_set)["state"] == "done"
    found = {finding["kind"]: finding for finding in studio.get(f"{data_set}/audit.json").json()["findings"]}
    assert found["conflicts"]["photos"] == ["blue/copy.jpg", red]
    assert found["damaged"]["photos"] == ["red/damaged.jpg"]
    page = studio.get(f"{data_set}/audit", headers=HTML).body.decode()
    assert "The same photo in two classes" in page
    assert post_json(studio, f"{data_set}/audit/ignore", {"finding": [found["damaged"]["key"]]}).status == 200
    assert post_json(studio, f"{data_set}/move", {"photo": ["blue/copy.jpg"], "to": "left-out"}).json()["moved"] == 1
    after = studio.get(f"{data_set}/audit.json").json()
    assert (after["findings"], after["is_outdated"]) == ([], True)
    assert "Damaged files" not in studio.get(f"{data_set}/audit", headers=HTML).body.decode()
    assert studio.request("POST", f"{data_set}/undo", b"").json()["undone"] == 1
    assert [finding["kind"] for finding in studio.get(f"{data_set}/audit.json").json()["findings"]] == ["conflicts"]


def test_the_active_model_suggests_classes_the_least_sure_first(studio: Server, photos: dict[str, bytes]) -> None:
    data_set = create(studio, "labeling")
    for name, data in photos.items():
        studio.request("PUT", f"{data_set}/photos/unlabeled/{name.replace('/', '-')}", data)
    url = f"{data_set}/photos?class=unlabeled"
    problem = studio.request("POST", f"{data_set}/suggestions", b"")
    assert problem.json()["detail"].startswith("The active model knows blue, green, red, and no class of labeling.")
    for label in ("blue", "green", "red"):
        first = next(name for name in photos if name.startswith(label)).replace("/", "-")
        assert post_json(studio, f"{data_set}/move", {"photo": [f"unlabeled/{first}"], "to": label}).json()["moved"] == 1
    assert studio.request("POST", f"{data_set}/suggestions", b"").status == 202
    task = finished(studio, data_set)
    assert task["state"] == "done"
    assert f" of {len(photos) - 3} photos" in task["message"]
    page = studio.get(url, headers=HTML).body.decode()
    suggested = dict(re.findall(r'value="unlabeled/([\w.-]+)" data-suggestion="(\w+)"', page))
    assert len(suggested) == len(photos) - 3
    assert all(name.startswith(label) for name, label in suggested.items())
    sure = [float(text) for text in re.findall(r'class="suggestion[^"]*"><bdi>\w+</bdi> [<>]?([\d.]+)%', page)]
    assert sure[0] <= sure[-1]


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (b"name=a\xff", "application/x-www-form-urlencoded", "bad_request"),
        (b"name=a", "text/plain", "unsupported_media_type"),
        (b"colour=red", "application/x-www-form-urlencoded", "bad_parameter"),
        (b'{"name": ["a"]}', "application/json", "bad_parameter"),
    ],
)
def test_a_body_that_cannot_be_read_is_rejected(studio: Server, body: bytes, kind: str, code: str) -> None:
    assert studio.post(body, kind, path="/studio/datasets").code == code
