"""Another bundle in the place of the one that serves: what is taken, what is refused, and what is said of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from service import create_app
from service.context import services_of
from service.http.errors import PROBLEM_TYPES
from service.inference.model_manager import LoadedModel
from service.settings import Settings
from tests.helpers.rollout_bundles import Bundles, make_bundles
from tests.helpers.server import PATIENT, START_S, parse_metrics, poll

KEY = {"X-API-Key": "sesame"}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return make_bundles(tmp_path_factory.mktemp("swap"))


@contextlib.contextmanager
def serving(bundle: Path, **settings: Any) -> Iterator[FlaskClient]:
    """The application with a key for its administrator, without a server before it."""
    app = create_app(Settings(bundle=bundle, **{"admin_keys": ("ann:sesame",), **PATIENT, **settings}))
    served = services_of(app).model_manager
    served.wait(START_S)
    try:
        yield app.test_client()
    finally:
        served.close()


@pytest.fixture
def client(bundles: Bundles) -> Iterator[FlaskClient]:
    """Serves ``one``, and has answered all photos."""
    with serving(bundles.path("one")) as client:
        for photo in bundles.all_photos():
            predict(client, photo)
        yield client


def predict(client: FlaskClient, photo: bytes) -> dict[str, Any]:
    answer = client.post("/predict", data=photo, content_type="image/jpeg")
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Model-Version"] == answer.get_json()["model"]["version"]
    return dict(answer.get_json())


def choose(client: FlaskClient, bundle: object, **more: Any) -> TestResponse:
    return client.post("/admin/bundle", json={"bundle": str(bundle), **more}, headers=KEY)


def refused(answer: TestResponse, code: str, *words: str) -> None:
    assert (answer.status_code, answer.get_json()["code"]) == (PROBLEM_TYPES[code][0], code), answer.text
    assert all(word in answer.get_json()["detail"] for word in words), answer.text


def metrics(client: FlaskClient) -> dict[str, float]:
    return parse_metrics(client.get("/metrics").text)


def status(client: FlaskClient) -> dict[str, Any]:
    answer = client.get("/admin/bundle", headers=KEY)
    assert (answer.status_code, answer.headers["Cache-Control"]) == (200, "no-store")
    return dict(answer.get_json())


# It changes


def test_another_bundle_takes_the_place_and_everything_says_so(client: FlaskClient, bundles: Bundles) -> None:
    photo = bundles.photo()
    before = predict(client, photo)
    answer = choose(client, bundles.path("two"))
    assert answer.status_code == 200, answer.text
    said = answer.get_json()
    assert (said["active"]["version"], said["previous"]["version"]) == (bundles.version("two"), bundles.version("one"))
    assert (said["active"]["actor"], said["previous"]["actor"], said["last_rejection"]) == ("ann", "BUNDLE", None)
    assert said["active"]["agreement"]["compared"] == 18
    assert said["active"]["agreement"]["agreed"] >= 17
    assert 0 < said["active"]["agreement"]["max_difference"] < 1
    assert (said["converged"], said["survives_restart"]) == (True, False)
    assert said == status(client)
    after = predict(client, photo)
    assert after["model"]["version"] == bundles.version("two") != before["model"]["version"]
    assert after["predictions"][0]["probabilities"] != before["predictions"][0]["probabilities"]
    assert client.get("/models").get_json()["models"][0]["version"] == bundles.version("two")
    assert client.get("/health/ready").get_json()["model"]["version"] == bundles.version("two")
    assert bundles.version("two") in client.get("/").text
    found = metrics(client)
    info = {name: value for name, value in found.items() if name.startswith("classifier_model_info")}
    assert {("one" if bundles.version("one") in name else "two"): value for name, value in info.items()} == {"one": 0, "two": 1}
    assert found['classifier_rollouts_total{outcome="activated"}'] == 1
    assert found["classifier_ready_workers"] == 1


def test_back_and_forth_at_once(client: FlaskClient, bundles: Bundles) -> None:
    refused(client.post("/admin/rollback", headers=KEY), "no_previous_bundle")
    wanted = predict(client, bundles.photo())["predictions"]
    choose(client, "two")
    answer = client.post("/admin/rollback", headers=KEY)
    assert answer.get_json()["active"]["version"] == bundles.version("one")
    assert answer.get_json()["survives_restart"]
    assert predict(client, bundles.photo())["predictions"] == wanted
    assert client.post("/admin/rollback", headers=KEY).get_json()["active"]["version"] == bundles.version("two")
    assert metrics(client)['classifier_rollouts_total{outcome="rolled_back"}'] == 2


def test_the_same_bundle_again_changes_nothing(client: FlaskClient, bundles: Bundles) -> None:
    before = status(client)
    assert choose(client, "one").get_json() == before
    assert services_of(client.application).model_manager.get().bundle.path == bundles.path("one")


def test_who_wants_to_know_is_told_of_every_model_that_serves(bundles: Bundles) -> None:
    told: list[str] = []

    def fail(model: LoadedModel) -> None:
        raise ZeroDivisionError

    with serving(bundles.path("one")) as client:
        served = services_of(client.application).model_manager
        served.add_install_callback(fail)
        served.add_install_callback(lambda model: told.append(model.bundle.version))
        assert choose(client, "two").status_code == 200
        assert client.post("/admin/rollback", headers=KEY).status_code == 200
        served.run_in_loader(lambda: None)
    assert told == [bundles.version(name) for name in ("one", "two", "one")]


def test_what_was_compared_is_compared_again_with_the_next(client: FlaskClient, bundles: Bundles) -> None:
    assert choose(client, "two").status_code == 200
    assert choose(client, "one").get_json()["active"]["agreement"]["compared"] == 18


def test_only_the_last_photos_are_kept_each_once(bundles: Bundles) -> None:
    with serving(bundles.path("one"), shadow_samples=4) as client:
        for photo in bundles.all_photos():
            predict(client, photo)
            predict(client, photo)
        assert choose(client, "two").get_json()["active"]["agreement"]["compared"] == 4
    with serving(bundles.path("one"), shadow_samples=0) as client:
        predict(client, bundles.photo())
        assert choose(client, "contrary").get_json()["active"]["agreement"]["skipped_reason"] == "SHADOW_SAMPLES is 0"


# It is refused


def unchanged(client: FlaskClient, bundles: Bundles) -> None:
    assert predict(client, bundles.photo())["model"]["version"] == bundles.version("one")
    assert metrics(client)['classifier_rollouts_total{outcome="rejected"}'] == 1
    refused(client.post("/admin/rollback", headers=KEY), "no_previous_bundle")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("changed", "bundle_invalid", "was changed or damaged"),
        ("edited", "bundle_invalid", "was changed after it was written"),
        ("wrong-golden", "bundle_invalid", "does not reproduce its golden outputs"),
        ("nothing", "bundle_invalid", "is not a bundle"),
        ("nowhere", "bundle_invalid", "is not a bundle"),
        ("fewer", "bundle_incompatible", "blue, red, the current one blue, green, red"),
        ("contrary", "bundle_incompatible", "of the last 18 images"),
    ],
)
def test_what_cannot_follow_is_refused_and_nothing_changes(
    client: FlaskClient, bundles: Bundles, name: str, code: str, words: str
) -> None:
    refused(choose(client, name), code, words)
    refusal = status(client)["last_rejection"]
    assert (refusal["bundle"], refusal["code"], refusal["actor"]) == (str(bundles.path(name)), code, "ann")
    assert words in refusal["reason"]
    unchanged(client, bundles)


def test_what_is_meant_to_differ_is_taken(client: FlaskClient, bundles: Bundles) -> None:
    refused(choose(client, "contrary", allow=["classes"]), "bundle_incompatible")
    said = choose(client, "contrary", allow=["disagreement"]).get_json()
    assert said["active"]["agreement"]["agreed"] < 9
    said = choose(client, "fewer", allow=["classes"]).get_json()
    assert said["active"]["agreement"]["skipped_reason"] == "the classes differ"
    assert set(predict(client, bundles.photo())["predictions"][0]["probabilities"]) == {"blue", "red"}


def test_how_far_they_must_agree_can_be_set(bundles: Bundles) -> None:
    with serving(bundles.path("one"), min_agreement=0.0) as client:
        predict(client, bundles.photo())
        assert choose(client, "contrary").status_code == 200


def test_pixels_of_another_crop_are_not_compared(client: FlaskClient) -> None:
    assert "the preprocessing differs" in choose(client, "other-crop").get_json()["active"]["agreement"]["skipped_reason"]


def test_a_bundle_from_elsewhere_is_none(client: FlaskClient, bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    for path in ("..", ".", "", "/", "/etc", tmp_path, "one/../../run-two/bundle", "a\0b", "x" * 5000):
        answer = choose(client, path)
        refused(answer, "bad_json" if path in ("", "a\0b") else "bundle_invalid")
    link = bundles.path("link-out")
    link.symlink_to(tmp_path)
    refused(choose(client, "link-out"), "bundle_invalid", "is not below")
    link.unlink()
    with serving(bundles.path("one"), bundle_root=tmp_path) as other:
        refused(choose(other, bundles.path("two")), "bundle_invalid", "Set BUNDLE_ROOT")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"{}", b'{"bundle": 5}', b'{"bundle": ""}', b'{"bundle": "two", "allow": "all"}',
        b'{"bundle": "two", "allow": [[]]}', b"[" * 900,
    ],
)  # fmt: skip
def test_a_request_that_is_none(client: FlaskClient, bundles: Bundles, body: bytes) -> None:
    refused(client.post("/admin/bundle", data=body, content_type="application/json", headers=KEY), "bad_json")
    assert status(client)["last_rejection"] is None


def test_only_with_an_administrators_key_in_a_header(bundles: Bundles) -> None:
    with serving(bundles.path("one"), api_keys=("bob:other",), cors_origins=("*",)) as client:
        body = {"bundle": "two"}
        for headers in ({}, {"X-API-Key": "other"}, {"Authorization": "Bearer other"}, {"X-API-Key": "ann"}):
            for answer in (
                client.post("/admin/bundle", json=body, headers=headers),
                client.post("/admin/rollback", headers=headers),
                client.get("/admin/bundle", headers=headers),
            ):
                refused(answer, "unauthorized")
                assert "Access-Control-Allow-Origin" not in answer.headers
        form = client.post("/admin/bundle", data=json.dumps(body), content_type="text/plain", headers=KEY)
        refused(form, "unsupported_media_type")
        assert choose(client, "two").status_code == 200
    with serving(bundles.path("one"), admin_keys=(), api_keys=("sesame",)) as client:
        refused(choose(client, "two"), "admin_disabled", "ADMIN_KEYS")
        refused(client.get("/admin/bundle", headers=KEY), "admin_disabled")


def test_going_back_to_what_is_gone_is_refused(bundles: Bundles, tmp_path: Path) -> None:
    folder = tmp_path / "bundles"
    for name in ("one", "two"):
        shutil.copytree(bundles.path(name), folder / name)
    with serving(folder / "one") as client:
        assert choose(client, "two").status_code == 200
        shutil.rmtree(folder / "one")
        shutil.copytree(bundles.path("contrary"), folder / "one")
        refused(client.post("/admin/rollback", headers=KEY), "bundle_invalid", "no longer contains the bundle")
        shutil.rmtree(folder / "one")
        refused(client.post("/admin/rollback", headers=KEY), "bundle_invalid", "is not a bundle")
        assert predict(client, bundles.photo())["model"]["version"] == bundles.version("two")


# The link


@pytest.fixture
def link(bundles: Bundles, tmp_path: Path) -> Path:
    """A link ``current`` that leads to ``one``."""
    link = tmp_path / "current"
    link.symlink_to(bundles.path("one"))
    return link


def lead_to(link: Path, target: Path) -> None:
    """As deployments do it: another link, renamed over the old one."""
    new = link.with_name("new")
    new.symlink_to(target)
    new.replace(link)


def test_a_link_that_leads_elsewhere_is_followed_and_a_bad_one_is_not(bundles: Bundles, link: Path) -> None:
    with serving(link, bundle_poll_s=0.05) as client:
        for photo in bundles.all_photos():
            predict(client, photo)
        assert status(client)["survives_restart"]
        for name in ("contrary", "changed"):
            lead_to(link, bundles.path(name))
            poll(lambda name=name: (status(client)["last_rejection"] or {}).get("bundle") == str(bundles.path(name)))  # type: ignore[misc]
            poll(lambda: "ended before" not in status(client)["last_rejection"]["reason"])
        said = status(client)
        assert (said["active"]["version"], said["last_rejection"]["actor"]) == (bundles.version("one"), "BUNDLE")
        lead_to(link, bundles.path("two"))
        poll(lambda: status(client)["active"]["version"] == bundles.version("two"))
        poll(lambda: predict(client, bundles.photo())["model"]["version"] == bundles.version("two"))
        assert status(client)["active"]["actor"] == "BUNDLE"
        assert metrics(client)['classifier_rollouts_total{outcome="rejected"}'] == 2
        poll(lambda: client.post("/admin/rollback", headers=KEY).status_code == 200)  # 409 while the link is being settled
        assert status(client)["survives_restart"] is False


def test_a_folder_is_not_followed_and_neither_is_a_link_where_that_is_off(bundles: Bundles, link: Path) -> None:
    for settings in ({"bundle": bundles.path("one")}, {"bundle": link, "bundle_poll_s": 0}):
        before = set(threading.enumerate())  # of the tests before, whose threads may be ending still
        with serving(**settings) as client:
            begun = set(threading.enumerate()) - before
            assert predict(client, bundles.photo())
        assert begun
        assert "watch-rollout" not in {thread.name for thread in begun}


def test_a_bundle_that_is_still_being_copied_is_waited_for(bundles: Bundles, link: Path, tmp_path: Path) -> None:
    with serving(link, bundle_poll_s=0.05) as client:
        copied = tmp_path / "copied"
        copied.mkdir()
        lead_to(link, copied)
        for name in ("manifest.json", "golden.npz"):
            shutil.copy(bundles.path("two") / name, copied)
        poll(lambda: (status(client)["last_rejection"] or {}).get("reason", "").startswith("The bundle"))
        shutil.copytree(bundles.path("two"), copied, dirs_exist_ok=True)
        poll(lambda: status(client)["active"]["version"] == bundles.version("two"))
