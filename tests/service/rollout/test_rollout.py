"""Rollouts without gunicorn: which bundles are activated or rejected, and how the state describes it."""

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
from tests.conftest import SharedFolder
from tests.helpers.rollout_bundles import Bundles, make_bundles
from tests.helpers.server import LONG_TIMEOUTS, START_TIMEOUT_S, parse_metrics, poll

pytestmark = pytest.mark.slow

KEY = {"X-API-Key": "sesame"}


@pytest.fixture(scope="module")
def bundles(shared_folder: SharedFolder) -> Bundles:
    return Bundles(shared_folder("rollout-bundles", make_bundles))


@contextlib.contextmanager
def serving(bundle: Path, **settings: Any) -> Iterator[FlaskClient]:
    """Run the application with an admin key, without a server."""
    app = create_app(Settings(bundle=bundle, **{"admin_keys": ("ann:sesame",), **LONG_TIMEOUTS, **settings}))
    models = services_of(app).model_manager
    models.wait(START_TIMEOUT_S)
    try:
        yield app.test_client()
    finally:
        models.close()


@pytest.fixture
def client(bundles: Bundles) -> Iterator[FlaskClient]:
    """A client of an application that serves ``one`` and has predicted all images."""
    with serving(bundles.path("one")) as client:
        for photo in bundles.all_photos():
            predict(client, photo)
        yield client


def predict(client: FlaskClient, photo: bytes) -> dict[str, Any]:
    response = client.post("/predict", data=photo, content_type="image/jpeg")
    assert response.status_code == 200, response.text
    assert response.headers["X-Model-Version"] == response.get_json()["model"]["version"]
    return dict(response.get_json())


def activate(client: FlaskClient, bundle: object, **more: Any) -> TestResponse:
    return client.post("/admin/bundle", json={"bundle": str(bundle), **more}, headers=KEY)


def assert_rejected(response: TestResponse, code: str, *words: str) -> None:
    assert (response.status_code, response.get_json()["code"]) == (PROBLEM_TYPES[code][0], code), response.text
    assert all(word in response.get_json()["detail"] for word in words), response.text


def metrics(client: FlaskClient) -> dict[str, float]:
    return parse_metrics(client.get("/metrics").text)


def status(client: FlaskClient) -> dict[str, Any]:
    response = client.get("/admin/bundle", headers=KEY)
    assert (response.status_code, response.headers["Cache-Control"]) == (200, "no-store")
    return dict(response.get_json())


# Activation


def test_an_activated_bundle_serves_and_is_reported_everywhere(client: FlaskClient, bundles: Bundles) -> None:
    photo = bundles.photo()
    before = predict(client, photo)
    response = activate(client, bundles.path("two"))
    assert response.status_code == 200, response.text
    state = response.get_json()
    assert (state["active"]["version"], state["previous"]["version"]) == (bundles.version("two"), bundles.version("one"))
    assert (state["active"]["actor"], state["previous"]["actor"], state["last_rejection"]) == ("ann", "BUNDLE", None)
    assert state["active"]["agreement"]["compared"] == 18
    assert state["active"]["agreement"]["agreed"] >= 17
    assert 0 < state["active"]["agreement"]["max_difference"] < 1
    assert (state["converged"], state["survives_restart"]) == (True, False)
    assert state == status(client)
    after = predict(client, photo)
    assert after["model"]["version"] == bundles.version("two") != before["model"]["version"]
    assert after["predictions"][0]["probabilities"] != before["predictions"][0]["probabilities"]
    assert client.get("/models").get_json()["models"][0]["version"] == bundles.version("two")
    assert client.get("/health/ready").get_json()["model"]["version"] == bundles.version("two")
    assert bundles.version("two") in client.get("/").text
    values = metrics(client)
    info = {name: value for name, value in values.items() if name.startswith("classifier_model_info")}
    assert {("one" if bundles.version("one") in name else "two"): value for name, value in info.items()} == {"one": 0, "two": 1}
    assert values['classifier_rollouts_total{outcome="activated"}'] == 1
    assert values["classifier_ready_workers"] == 1


def test_a_rollback_can_be_rolled_back(client: FlaskClient, bundles: Bundles) -> None:
    assert_rejected(client.post("/admin/rollback", headers=KEY), "no_previous_bundle")
    expected = predict(client, bundles.photo())["predictions"]
    activate(client, "two")
    response = client.post("/admin/rollback", headers=KEY)
    assert response.get_json()["active"]["version"] == bundles.version("one")
    assert response.get_json()["survives_restart"]
    assert predict(client, bundles.photo())["predictions"] == expected
    assert client.post("/admin/rollback", headers=KEY).get_json()["active"]["version"] == bundles.version("two")
    assert metrics(client)['classifier_rollouts_total{outcome="rolled_back"}'] == 2


def test_activating_the_current_bundle_changes_nothing(client: FlaskClient, bundles: Bundles) -> None:
    before = status(client)
    assert activate(client, "one").get_json() == before
    assert services_of(client.application).model_manager.get().bundle.path == bundles.path("one")


def test_install_callbacks_are_called_for_every_model(bundles: Bundles) -> None:
    versions: list[str] = []

    def fail(model: LoadedModel) -> None:
        raise ZeroDivisionError

    with serving(bundles.path("one")) as client:
        models = services_of(client.application).model_manager
        models.add_install_callback(fail)
        models.add_install_callback(lambda model: versions.append(model.bundle.version))
        assert activate(client, "two").status_code == 200
        assert client.post("/admin/rollback", headers=KEY).status_code == 200
        models.run_in_loader(lambda: None)
    assert versions == [bundles.version(name) for name in ("one", "two", "one")]


def test_the_recent_images_are_compared_again_with_the_next_bundle(client: FlaskClient, bundles: Bundles) -> None:
    assert activate(client, "two").status_code == 200
    assert activate(client, "one").get_json()["active"]["agreement"]["compared"] == 18


def test_only_the_last_different_images_are_kept(bundles: Bundles) -> None:
    with serving(bundles.path("one"), shadow_samples=4) as client:
        for photo in bundles.all_photos():
            predict(client, photo)
            predict(client, photo)
        assert activate(client, "two").get_json()["active"]["agreement"]["compared"] == 4
    with serving(bundles.path("one"), shadow_samples=0) as client:
        predict(client, bundles.photo())
        assert activate(client, "contrary").get_json()["active"]["agreement"]["skipped_reason"] == "SHADOW_SAMPLES is 0"


# Rejection


def assert_unchanged(client: FlaskClient, bundles: Bundles) -> None:
    assert predict(client, bundles.photo())["model"]["version"] == bundles.version("one")
    assert metrics(client)['classifier_rollouts_total{outcome="rejected"}'] == 1
    assert_rejected(client.post("/admin/rollback", headers=KEY), "no_previous_bundle")


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
def test_a_bundle_that_is_invalid_or_incompatible_is_rejected(
    client: FlaskClient, bundles: Bundles, name: str, code: str, words: str
) -> None:
    assert_rejected(activate(client, name), code, words)
    rejection = status(client)["last_rejection"]
    assert (rejection["bundle"], rejection["code"], rejection["actor"]) == (str(bundles.path(name)), code, "ann")
    assert words in rejection["reason"]
    assert_unchanged(client, bundles)


def test_differences_can_be_allowed(client: FlaskClient, bundles: Bundles) -> None:
    assert_rejected(activate(client, "contrary", allow=["classes"]), "bundle_incompatible")
    state = activate(client, "contrary", allow=["disagreement"]).get_json()
    assert state["active"]["agreement"]["agreed"] < 9
    state = activate(client, "fewer", allow=["classes"]).get_json()
    assert state["active"]["agreement"]["skipped_reason"] == "the classes differ"
    assert set(predict(client, bundles.photo())["predictions"][0]["probabilities"]) == {"blue", "red"}


def test_the_required_agreement_is_a_setting(bundles: Bundles) -> None:
    with serving(bundles.path("one"), min_agreement=0.0) as client:
        predict(client, bundles.photo())
        assert activate(client, "contrary").status_code == 200


def test_images_with_another_preprocessing_are_not_compared(client: FlaskClient) -> None:
    assert "the preprocessing differs" in activate(client, "other-crop").get_json()["active"]["agreement"]["skipped_reason"]


def test_a_path_outside_the_bundle_root_is_rejected(client: FlaskClient, bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    for path in ("..", ".", "", "/", "/etc", tmp_path, "one/../../run-two/bundle", "a\0b", "x" * 5000):
        response = activate(client, path)
        assert_rejected(response, "bad_json" if path in ("", "a\0b") else "bundle_invalid")
    link = bundles.path("link-out")
    link.symlink_to(tmp_path)
    assert_rejected(activate(client, "link-out"), "bundle_invalid", "is not below")
    link.unlink()
    with serving(bundles.path("one"), bundle_root=tmp_path) as other:
        assert_rejected(activate(other, bundles.path("two")), "bundle_invalid", "Set BUNDLE_ROOT")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"{}", b'{"bundle": 5}', b'{"bundle": ""}', b'{"bundle": "two", "allow": "all"}',
        b'{"bundle": "two", "allow": [[]]}', b"[" * 900,
    ],
)  # fmt: skip
def test_an_invalid_request_is_rejected(client: FlaskClient, bundles: Bundles, body: bytes) -> None:
    assert_rejected(client.post("/admin/bundle", data=body, content_type="application/json", headers=KEY), "bad_json")
    assert status(client)["last_rejection"] is None


def test_administration_requires_an_admin_key_in_a_header(bundles: Bundles) -> None:
    with serving(bundles.path("one"), api_keys=("bob:other",), cors_origins=("*",)) as client:
        body = {"bundle": "two"}
        for headers in ({}, {"X-API-Key": "other"}, {"Authorization": "Bearer other"}, {"X-API-Key": "ann"}):
            for response in (
                client.post("/admin/bundle", json=body, headers=headers),
                client.post("/admin/rollback", headers=headers),
                client.get("/admin/bundle", headers=headers),
            ):
                assert_rejected(response, "unauthorized")
                assert "Access-Control-Allow-Origin" not in response.headers
        form = client.post("/admin/bundle", data=json.dumps(body), content_type="text/plain", headers=KEY)
        assert_rejected(form, "unsupported_media_type")
        assert activate(client, "two").status_code == 200
    with serving(bundles.path("one"), admin_keys=(), api_keys=("sesame",)) as client:
        assert_rejected(activate(client, "two"), "admin_disabled", "ADMIN_KEYS")
        assert_rejected(client.get("/admin/bundle", headers=KEY), "admin_disabled")


def test_a_rollback_to_a_bundle_that_is_gone_is_rejected(bundles: Bundles, tmp_path: Path) -> None:
    folder = tmp_path / "bundles"
    for name in ("one", "two"):
        shutil.copytree(bundles.path(name), folder / name)
    with serving(folder / "one") as client:
        assert activate(client, "two").status_code == 200
        shutil.rmtree(folder / "one")
        shutil.copytree(bundles.path("contrary"), folder / "one")
        assert_rejected(client.post("/admin/rollback", headers=KEY), "bundle_invalid", "no longer contains the bundle")
        shutil.rmtree(folder / "one")
        assert_rejected(client.post("/admin/rollback", headers=KEY), "bundle_invalid", "is not a bundle")
        assert predict(client, bundles.photo())["model"]["version"] == bundles.version("two")


# Symbolic links


@pytest.fixture
def link(bundles: Bundles, tmp_path: Path) -> Path:
    """A symbolic link to ``one``."""
    link = tmp_path / "current"
    link.symlink_to(bundles.path("one"))
    return link


def point_to(link: Path, target: Path) -> None:
    """Replace the link as deployments do: a new one is renamed over it."""
    new = link.with_name("new")
    new.symlink_to(target)
    new.replace(link)


def test_a_changed_link_is_followed_unless_its_bundle_is_rejected(bundles: Bundles, link: Path) -> None:
    with serving(link, bundle_poll_s=0.05) as client:
        for photo in bundles.all_photos():
            predict(client, photo)
        assert status(client)["survives_restart"]
        for name in ("contrary", "changed"):
            point_to(link, bundles.path(name))
            poll(lambda name=name: (status(client)["last_rejection"] or {}).get("bundle") == str(bundles.path(name)))  # type: ignore[misc]
            poll(lambda: "ended before" not in status(client)["last_rejection"]["reason"])
        state = status(client)
        assert (state["active"]["version"], state["last_rejection"]["actor"]) == (bundles.version("one"), "BUNDLE")
        point_to(link, bundles.path("two"))
        poll(lambda: status(client)["active"]["version"] == bundles.version("two"))
        poll(lambda: predict(client, bundles.photo())["model"]["version"] == bundles.version("two"))
        assert status(client)["active"]["actor"] == "BUNDLE"
        assert metrics(client)['classifier_rollouts_total{outcome="rejected"}'] == 2
        poll(lambda: client.post("/admin/rollback", headers=KEY).status_code == 200)  # 409 while the link is being considered
        assert status(client)["survives_restart"] is False


def test_folders_and_links_without_polling_are_not_watched(bundles: Bundles, link: Path) -> None:
    for settings in ({"bundle": bundles.path("one")}, {"bundle": link, "bundle_poll_s": 0}):
        before = set(threading.enumerate())  # threads of earlier tests may still be ending
        with serving(**settings) as client:
            started = set(threading.enumerate()) - before
            assert predict(client, bundles.photo())
        assert started
        assert "watch-rollout" not in {thread.name for thread in started}


def test_a_bundle_is_activated_once_it_is_copied_completely(bundles: Bundles, link: Path, tmp_path: Path) -> None:
    with serving(link, bundle_poll_s=0.05) as client:
        copied = tmp_path / "copied"
        copied.mkdir()
        point_to(link, copied)
        for name in ("manifest.json", "golden.npz"):
            shutil.copy(bundles.path("two") / name, copied)
        poll(lambda: (status(client)["last_rejection"] or {}).get("reason", "").startswith("The bundle"))
        shutil.copytree(bundles.path("two"), copied, dirs_exist_ok=True)
        poll(lambda: status(client)["active"]["version"] == bundles.version("two"))
