"""The upload page without JavaScript, the page of the model, and the common parts of all pages."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flask import Flask
from PIL import Image
from werkzeug.test import TestResponse

from models.artifacts.bundle import open_bundle, write_bundle
from models.errors import BundleError
from service import create_app
from service.api.predict import Prediction
from service.app import create_full_app, create_services
from service.context import services_of
from service.cpu_allocation import allocate_resources
from service.http.errors import Problem
from service.http.request_images import Upload
from service.inference.batcher import InferenceResult
from service.inference.image_decoder import ImageDecoder, PreprocessedImage
from service.inference.model_manager import ModelManager, load_model
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.web import upload_page
from service.web.layout import NAVIGATION, percent
from tests.helpers.server import LONG_TIMEOUTS, START_TIMEOUT_S, multipart, poll, serve

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=alert(1)>&'.jpg"


@pytest.fixture(scope="module")
def app(tiny_bundle: SimpleNamespace) -> Iterator[Flask]:
    app = create_app(Settings(bundle=tiny_bundle.path, max_images=4, max_body_mb=1, max_megapixels=1, **LONG_TIMEOUTS))
    services_of(app).model_manager.wait(START_TIMEOUT_S)
    yield app
    services_of(app).model_manager.close()


@pytest.fixture(scope="module")
def keyed(tiny_bundle: SimpleNamespace) -> Iterator[Flask]:
    app = create_app(Settings(bundle=tiny_bundle.path, api_keys=("ann:sesame", "grün"), **LONG_TIMEOUTS))
    services_of(app).model_manager.wait(START_TIMEOUT_S)
    yield app
    services_of(app).model_manager.close()


@pytest.fixture
def loading(tiny_bundle: SimpleNamespace) -> Flask:
    """An application whose model is never loaded."""
    settings = Settings(bundle=tiny_bundle.path)
    return create_full_app(create_services(settings, ModelManager(settings, Metrics())))


@pytest.fixture
def photo(tiny_bundle: SimpleNamespace) -> bytes:
    return (tiny_bundle.photos / "red" / "red.000.jpg").read_bytes()


def post(app: Flask, *files: tuple[bytes, str], **fields: str) -> TestResponse:
    parts = [("file", name, content) for content, name in files] + [(key, None, text.encode()) for key, text in fields.items()]
    body, kind = multipart(*parts)
    return app.test_client().post("/", data=body, content_type=kind)


def get(app: Flask, path: str, **options: Any) -> TestResponse:
    """Return the response. If it is a file, the file is closed."""
    with app.test_client().get(path, **options) as answer:
        answer.get_data()
        return answer


def cards(answer: TestResponse) -> list[str]:
    """Return the HTML of the cards, without the template that the script fills."""
    shown = answer.text.partition("<template")[0]
    return re.findall(r'<li class="card.*?(?=<li class="card|</ol>)', shown, re.DOTALL)


def text_of(answer: TestResponse) -> str:
    """Return the visible text of the page, with each run of white space as one space."""
    main = re.sub(r"<template.*?</template>", "", answer.text, flags=re.DOTALL)
    return html.unescape(" ".join(re.sub(r"<[^>]*>", "", main).split()))


# The form


def test_the_form_has_a_file_input_and_no_key_field(app: Flask) -> None:
    answer = app.test_client().get("/")
    assert answer.status_code == 200
    assert answer.mimetype == "text/html"
    assert 'enctype="multipart/form-data"' in answer.text
    assert re.search(r'<input id="files" type="file" name="file" multiple accept="image/jpeg,[^"]*\.heic,\.heif"', answer.text)
    assert "JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP, TIFF or PPM. One or more photos." in text_of(answer)
    assert (
        "This model only knows blue, green and red. A photo of anything else gets no label, as far as the model can tell."
        in text_of(answer)
    )
    assert not cards(answer)
    assert 'name="key"' not in answer.text


def test_results_are_in_the_order_of_the_photos_with_the_invalid_one(app: Flask, photo: bytes) -> None:
    answer = post(app, (photo, "one.jpg"), (b"no picture", "two.txt"), (photo, "three.jpg"))
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    one, two, three = cards(answer)
    assert all(name in card for name, card in (("one.jpg", one), ("two.txt", two), ("three.jpg", three)))
    assert ">red</bdi>" in one
    assert re.findall(r'data-slot="name">(\w+)<', one)[0] == "red"
    assert 'src="data:image/png;base64,' in one
    assert "JPEG, 56 \u00d7 44 pixels" in one
    assert "This file is not a supported image. Use JPEG" in two
    assert "<img" not in two
    assert 'role="alert"' not in answer.text


def test_the_bars_are_the_probabilities_of_the_api(app: Flask, photo: bytes) -> None:
    page = cards(post(app, (photo, "a.jpg")))[0]
    body = {"file": (io.BytesIO(photo), "a.jpg")}
    api = app.test_client().post("/predict?crop=1", data=body).get_json()["predictions"][0]
    highest_first = sorted(api["probabilities"].items(), key=lambda row: -row[1])
    widths = [float(text) for text in re.findall(r'<rect data-slot="fill" width="([\d.]+)"', page)]
    assert re.findall(r'data-slot="name">(\w+)<', page) == [name for name, _ in highest_first]
    assert widths == pytest.approx([100 * share for _, share in highest_first], abs=0.01)
    assert api["crop"] in page


def test_a_photo_unlike_the_training_photos_gets_a_sentence_and_folded_probabilities(app: Flask) -> None:
    file = io.BytesIO()
    Image.new("RGB", (56, 44)).save(file, "PNG")
    (card,) = cards(post(app, (file.getvalue(), "night.png")))
    sentence = upload_page.none_of(("blue", "green", "red"))
    assert f'data-slot="label">{sentence}</bdi>' in card
    assert 'data-slot="confidence"' not in card
    first, _, folded = card.partition("<details")
    assert 'data-slot="name"' not in first
    assert '<summary data-slot="summary">Show probabilities</summary>' in folded
    assert len(re.findall(r'data-slot="name">', folded)) == 3
    assert f'data-neither="{sentence}"' in get(app, "/").text


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (("cats", "dogs"), "Neither cats nor dogs, as far as this model can tell."),
        (tuple("abc"), "None of a, b and c, as far as this model can tell."),
        (tuple("abcdefg"), "None of the 7 classes, as far as this model can tell."),
    ],
)
def test_the_sentence_names_a_few_classes(classes: tuple[str, ...], text: str) -> None:
    assert upload_page.none_of(classes).translate({0x2068: None, 0x2069: None}) == text


def test_a_file_name_is_escaped(app: Flask, photo: bytes) -> None:
    answer = post(app, (photo, HOSTILE), (b"no picture", "../" + HOSTILE))
    assert len(cards(answer)) == 2
    assert "<img src=x" not in answer.text
    assert "&lt;img src=x onerror=alert(1)&gt;" in answer.text


def test_of_many_classes_the_ten_most_probable_are_shown_and_the_others_folded(app: Flask, photo: bytes) -> None:
    model = services_of(app).model_manager.get()
    names = [f"kind {i}" for i in range(25)]
    bundle = dataclasses.replace(model.bundle, manifest={**model.bundle.manifest, "classes": names})
    many = dataclasses.replace(model, bundle=bundle)
    shares = np.arange(25, dtype=np.float32) / 300
    prepared = PreprocessedImage(np.zeros((32, 32, 3), np.uint8), 5, 4, "GIF", ("It has several frames.",))
    row = Prediction(Upload("a.gif", b""), InferenceResult(prepared, shares, 0, 0, 0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upload_page, "classify", lambda uploads: (many, [row]))
        (card,) = cards(post(app, (photo, "a.gif")))
    first, _, others = card.partition("<details")
    assert re.findall(r'data-slot="name">(.*?)<', first) == names[:14:-1]
    assert len(re.findall(r'data-slot="name">', others)) == 15
    assert "It has several frames." in card


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [
        (1.0, 1, "100.0%"),
        (0.99996, 1, ">99.9%"),
        (0.99996, 2, ">99.99%"),
        (0.99996, 3, "99.996%"),
        (0.9995, 0, ">99%"),
        (0.9994, 1, "99.9%"),
        (0.5, 1, "50.0%"),
        (0.0004, 2, "0.04%"),
        (0.0001, 1, "<0.1%"),
        (0.0001, 0, "<1%"),
        (0.0, 2, "0.00%"),
    ],
)
def test_a_fraction_is_not_rounded_to_all_or_nothing(share: float, digits: int, text: str) -> None:
    assert percent(share, digits) == text


def test_a_probability_of_1_is_not_shown_as_certain(app: Flask, photo: bytes) -> None:
    prepared = PreprocessedImage(np.zeros((32, 32, 3), np.uint8), 5, 4, "GIF", ())
    model = services_of(app).model_manager.get()
    shares = np.eye(len(model.bundle.classes), dtype=np.float32)[0]
    row = Prediction(Upload("a.gif", b""), InferenceResult(prepared, shares, 0, 0, 0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upload_page, "classify", lambda uploads: (model, [row]))
        (card,) = cards(post(app, (photo, "a.gif")))
    message = re.findall(r'data-slot="(?:confidence|value)">([^<]*)<', card)
    assert message == ["&gt;99.9%"] * 2 + ["&lt;0.1%"] * (len(shares) - 1)


def test_a_sample_photo_is_offered_where_the_model_knows_it(app: Flask) -> None:
    model = services_of(app).model_manager.get()
    assert 'id="sample"' not in get(app, "/").text
    cats = dataclasses.replace(model.bundle, manifest={**model.bundle.manifest, "classes": ["Cats", "Dogs"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services_of(app).model_manager, "_model", dataclasses.replace(model, bundle=cats))
        address = re.search('<button id="sample"[^>]* data-url="([^"]*)">Try a sample photo</button>', get(app, "/").text)
    assert address
    sample = get(app, address[1])
    assert (sample.status_code, sample.mimetype) == (200, "image/jpeg")


# Names and links


def test_names_are_isolated_from_the_direction_of_the_text_around_them(app: Flask, photo: bytes) -> None:
    hebrew, arabic = "\u05d7\u05ea\u05d5\u05dc", "\u0643\u0644\u0628"
    model = services_of(app).model_manager.get()
    text = json.dumps(model.bundle.manifest).replace('"blue"', f'"{hebrew}"').replace('"green"', f'"{arabic}"')
    moved = dataclasses.replace(model, bundle=dataclasses.replace(model.bundle, manifest=json.loads(text)), card=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services_of(app).model_manager, "_model", moved)
        pages = [post(app, (photo, "\u202egpj.exe")).text, app.test_client().get("/model").text]
    for name in (hebrew, arabic):
        for page in pages:
            isolated = re.findall(f"<bdi[^>]*>(?:<strong>)?{name}<|\u2068{name}\u2069", page)
            assert page.count(name) == len(isolated) > 0
    assert re.search('<bdi class="file" data-slot="file" title="[^"]*">\u202egpj.exe</bdi>', pages[0])


def test_a_saved_photo_links_to_its_page_in_the_gallery(tiny_bundle: SimpleNamespace, photo: bytes, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'reviews.db'}"
    with serve(tiny_bundle.path, save_predictions=1, database_url=url) as server:
        poll(lambda: server.get("/gallery").status == 200)
        row = server.post(photo).json()["predictions"][0]
        body, kind = multipart(("file", "a.jpg", photo))
        page = server.post(body, kind, path="/").body.decode().partition("<template")[0]
        found = [html.unescape(link) for link in re.findall('<p class="card-links".*?</p>', page, re.DOTALL)]
        assert re.findall('href="([^"]*)"', found[0]) == [row["page"], row["page"] + "#review"]
        poll(lambda: server.get(row["page"]).status == 200)


def test_a_photo_that_is_not_saved_has_no_links(app: Flask, photo: bytes) -> None:
    assert "card-links" not in cards(post(app, (photo, "a.jpg")))[0]
    answer = app.test_client().post("/predict", data={"file": (io.BytesIO(photo), "a.jpg")})
    assert "page" not in answer.get_json()["predictions"][0]


# Problems of the whole request


@pytest.mark.parametrize(
    ("files", "status", "words"),
    [
        ([], 400, "Choose at least one photo, then press Classify."),
        ([(b"", "")], 400, "Choose at least one photo, then press Classify."),
        ([(b"", "empty.jpg")], 400, "The file is empty."),
        ([(b"no picture", "a.jpg")], 415, "not a supported image"),
        ([(b"x", "a.jpg")] * 5, 413, "Too many images: 5 images, the limit is 4."),
        ([(b"x" * 1_100_000, "a.jpg")], 413, "Upload too large: 1.1 MB, the limit is 1 MB."),
    ],
    ids=["nothing", "nothing chosen", "empty", "one bad", "too many", "too large"],
)
def test_a_problem_is_shown_on_the_page(app: Flask, files: list[tuple[bytes, str]], status: int, words: str) -> None:
    answer = post(app, *files)
    assert answer.status_code == status
    assert answer.mimetype == "text/html"
    alert = re.search(r'role="alert".*?</div>', answer.text, re.DOTALL)
    assert alert
    assert words in alert[0]
    assert re.search(r"<strong>\w.*\.</strong>", alert[0])
    assert '<input id="files"' in answer.text


def test_a_body_that_is_not_a_form_is_rejected(app: Flask, photo: bytes) -> None:
    answer = app.test_client().post("/", data=photo, content_type="image/jpeg")
    assert answer.status_code == 415
    assert "POST /predict" in answer.text


def test_overload_is_shown_on_the_page_with_the_time_to_wait(app: Flask, photo: bytes) -> None:
    admission = services_of(app).admission
    admission.acquire(64)
    try:
        answer = post(app, (photo, "a.jpg"))
    finally:
        admission.release(64)
    assert (answer.status_code, answer.mimetype) == (503, "text/html")
    assert int(answer.headers["Retry-After"]) >= 1
    assert "The server is at capacity (64 of 64 images in flight)." in answer.text
    assert 'http-equiv="refresh"' not in answer.text
    assert admission.in_flight == 0


def test_an_unexpected_error_is_shown_with_its_request_id(app: Flask, photo: bytes) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upload_page, "classify", fail)
        answer = post(app, (photo, "a.jpg"))
    assert answer.status_code == 500
    assert answer.headers["X-Request-ID"] in answer.text
    assert "secret" not in answer.text


@pytest.mark.parametrize("path", ["/", "/model"])
def test_while_the_model_loads_the_page_reloads(loading: Flask, path: str) -> None:
    answer = loading.test_client().get(path)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert '<meta http-equiv="refresh" content="1">' in answer.text
    assert "being loaded" in answer.text


def test_the_page_is_refreshed_while_loading_the_model_is_retried(tmp_path: Path) -> None:
    app = create_app(Settings(bundle=tmp_path))
    with pytest.raises(Problem):
        services_of(app).model_manager.wait(START_TIMEOUT_S)
    answer = app.test_client().get("/")
    assert answer.status_code == 503
    assert "is not a bundle" in answer.text
    assert '<meta http-equiv="refresh" content="10">' in answer.text
    services_of(app).model_manager.close()


def test_problems_on_the_page_are_counted(app: Flask) -> None:
    errors = services_of(app).model_manager.metrics.errors.labels("no_image")
    before = errors._value.get()
    post(app)
    assert errors._value.get() == before + 1


# Keys


def test_with_api_keys_the_page_has_a_field_and_requires_a_key(keyed: Flask, photo: bytes) -> None:
    assert re.search(r'<input id="key" name="key" type="password"', keyed.test_client().get("/").text)
    without, wrong = post(keyed, (photo, "a.jpg")), post(keyed, (photo, "a.jpg"), key="open")
    assert (without.status_code, wrong.status_code) == (401, 401)
    assert "Enter your API key below." in without.text
    assert "Unknown API key." in wrong.text
    assert "Bearer" in wrong.headers["WWW-Authenticate"]
    assert not cards(wrong)


@pytest.mark.parametrize("key", ["sesame", " sesame ", "grün"])
def test_a_valid_key_is_accepted_and_not_sent_back(keyed: Flask, photo: bytes, key: str) -> None:
    answer = post(keyed, (photo, "a.jpg"), key=key)
    assert answer.status_code == 200
    assert len(cards(answer)) == 1
    assert key.strip() not in answer.text


# All pages


@pytest.mark.parametrize("path", ["/", "/model", "/docs"])
def test_a_page_loads_nothing_from_other_sites_and_runs_no_inline_script(app: Flask, path: str) -> None:
    answer = app.test_client().get(path)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", answer.text)
    for address in re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="([^"]*)"', answer.text):
        assert address.startswith("/static/")
        assert get(app, address).status_code == 200


@pytest.mark.parametrize("path", ["/", "/model", "/docs"])
def test_the_header_has_the_model_and_the_navigation(app: Flask, path: str) -> None:
    text = app.test_client().get(path).text
    model = services_of(app).model_manager.get()
    assert all(words in text for words in (model.bundle.name, model.bundle.version, model.precision.name))
    assert all(f">{entry.label}</a>" in text for entry in NAVIGATION)
    assert re.findall(r'<a href="([^"]*)" aria-current="page">', text) == [path]


def test_an_error_page_has_its_title_once(app: Flask) -> None:
    text = app.test_client().get("/gallery/photo?x=1").text
    heading = re.search("<h1>(.*?)</h1>", text)
    assert heading
    assert re.sub("<title>.*?</title>", "", text).count(heading[1]) == 1


def test_an_unknown_address_is_a_page_for_a_browser_and_json_for_a_program(app: Flask) -> None:
    browser = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
    page = get(app, "/nope", headers=browser)
    assert (page.status_code, page.mimetype) == (404, "text/html")
    assert "/nope does not exist." in page.text
    assert '<a href="/">Home</a>' in page.text
    for accept in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        assert get(app, "/nope", headers=accept).mimetype == "application/problem+json"


def test_a_static_file_is_cached_for_a_year_under_its_version_only(app: Flask) -> None:
    address = re.findall(r'href="(/static/site\.css\?v=\w+)"', get(app, "/").text)[0]
    first = get(app, address)
    assert first.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    for other in ("/static/site.css", "/static/site.css?v=older"):
        assert get(app, other).headers["Cache-Control"] == "no-cache"
    assert get(app, address, headers={"If-None-Match": first.headers["ETag"]}).status_code == 304
    assert get(app, "/static/../app.py").status_code == 404


def test_behind_a_proxy_the_addresses_have_its_prefix(tiny_bundle: SimpleNamespace) -> None:
    app = create_app(Settings(bundle=tiny_bundle.path, trusted_proxies=1))
    services_of(app).model_manager.wait(START_TIMEOUT_S)
    headers = {"X-Forwarded-Prefix": "/animals", "X-Forwarded-Host": "example.org", "X-Forwarded-Proto": "https"}
    text = app.test_client().get("/", headers=headers).text
    assert 'action="/animals/#results"' in text
    assert 'data-predict="/animals/predict"' in text
    assert "https://example.org/animals/predict" in text
    for prefix in ("//evil.example", "/\\evil.example", "https://evil.example", "/a/../b?c", "/a//evil.example", "a"):
        text = app.test_client().get("/", headers=headers | {"X-Forwarded-Prefix": prefix}).text
        assert "evil" not in text, prefix
        assert 'action="/#results"' in text, prefix
    services_of(app).model_manager.close()


# The model


def test_the_model_card_is_shown_with_its_metrics(app: Flask) -> None:
    text = app.test_client().get("/model").text
    assert "<h3>Metrics</h3>" in text
    assert re.search(r"<td>accuracy</td>\s*<td>[\d.]+</td>\s*<td>[\d.]+ to [\d.]+</td>", text)
    assert len(re.findall("<h1", text)) == 1
    assert re.search(r"<dt>Accuracy</dt><dd>[\d.]+%<small>\d+ of \d+ evaluation photos</small>", text)


def test_html_in_a_model_card_is_escaped(app: Flask) -> None:
    hostile = "# Card\n\n<script>alert(1)</script> ![x](https://example.org/x.png) [go](javascript:alert(1))\n"
    text = _with_card(app, hostile).text
    assert "<script>alert" not in text
    assert 'javascript:alert(1)"' not in text
    assert not re.search("<img[^>]*example.org", text)


def test_without_a_model_card_the_metrics_of_the_manifest_are_shown(app: Flask) -> None:
    answer = _with_card(app, None)
    assert answer.status_code == 200
    assert "The bundle has no model card (README.md). These metrics are from its manifest." in answer.text
    assert re.search(r'<th scope="row">accuracy</th><td>[\d.]+</td>', answer.text)


@pytest.mark.parametrize("target", [None, "/etc/passwd", "/dev/zero"])
def test_a_bundle_whose_card_was_changed_is_not_served(
    tiny_bundle: SimpleNamespace, tmp_path: Path, target: str | None
) -> None:
    bundle = shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    (bundle / "README.md").unlink()
    if target:
        (bundle / "README.md").symlink_to(target)
    else:
        (bundle / "README.md").write_text("# Another card\n")
    settings = Settings(bundle=bundle)
    with pytest.raises(BundleError, match=r"README\.md"):
        load_model(settings, allocate_resources(settings), Metrics(), ImageDecoder.of(settings))


def test_a_card_that_is_changed_while_it_is_served_is_not_shown(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    app = create_app(Settings(bundle=bundle, **LONG_TIMEOUTS))
    services_of(app).model_manager.wait(START_TIMEOUT_S)
    card = (bundle / "README.md").read_text(encoding="utf-8")
    (bundle / "README.md").unlink()
    (bundle / "README.md").symlink_to("/etc/passwd")
    assert app.test_client().get("/models").get_json()["models"][0]["card"] == card
    assert "root:" not in app.test_client().get("/model").text
    services_of(app).model_manager.close()


def test_every_class_has_its_precision_recall_and_photos(app: Flask) -> None:
    bundle = services_of(app).model_manager.get().bundle
    metrics = bundle.manifest["metrics"]
    table = re.search(r'<table class="by-class">.*?</table>', app.test_client().get("/model").text, re.DOTALL)
    assert table
    rows = re.findall(r'<th scope="row"><bdi>(.*?)</bdi></th>(.*?)</tr>', table[0])
    assert [name for name, _ in rows] == list(bundle.classes)
    for name, cells in rows:
        shown = [f"{percent(row['value'])}<small> {percent(row['low'])} to {percent(row['high'])}</small>"
                 for row in (metrics["precision"][name], metrics["recall"][name])]  # fmt: skip
        assert re.findall("<td>(.*?)</td>", cells) == [*shown, str(metrics["support"][name])]


def test_the_plots_of_a_bundle_are_shown_and_nothing_else_of_its_folder(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    manifest = open_bundle(tiny_bundle.path).manifest
    fields = {name: value for name, value in manifest.items() if name not in ("format", "files", "sha256")}

    def write_files(folder: Path) -> None:
        shutil.copytree(tiny_bundle.path, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        (folder / "plots").mkdir()
        for name in ("confusion_matrix", "learning_curves", "random_correct_red"):
            Image.new("RGB", (8, 6)).save(folder / "plots" / f"{name}.png")

    bundle = write_bundle(tmp_path / "bundle", fields, write_files=write_files)
    app = create_app(Settings(bundle=bundle.path, **LONG_TIMEOUTS))
    services_of(app).model_manager.wait(START_TIMEOUT_S)
    shown = re.findall(r'<img src="(/model/plots/[^"]*)" alt="([^"]*)"', get(app, "/model").text)
    assert shown == [
        ("/model/plots/learning_curves.png", f"Learning curves of {bundle.name}"),
        ("/model/plots/confusion_matrix.png", f"Confusion matrix of {bundle.name}"),
    ]
    answer = get(app, shown[0][0])
    assert (answer.status_code, answer.mimetype) == (200, "image/png")
    assert answer.data == (bundle.path / "plots" / "learning_curves.png").read_bytes()
    assert get(app, shown[0][0], headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304
    for name in ("reliability.png", "random_correct_red.png", "../model.onnx", "..%2Fmanifest.png", "%2Fetc%2Fpasswd.png"):
        assert get(app, f"/model/plots/{name}").status_code == 404, name
    (bundle.path / "plots" / "learning_curves.png").write_bytes(b"changed")
    assert get(app, shown[0][0]).status_code == 404
    services_of(app).model_manager.close()


def _with_card(app: Flask, card: str | None) -> TestResponse:
    """GET /model of a bundle with this model card."""
    served = services_of(app).model_manager
    model = served.get()
    moved = dataclasses.replace(model, card=card)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "_model", moved)
        return app.test_client().get("/model")
