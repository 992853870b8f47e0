"""POST /predict from the client's side: accepted bodies, responses and errors."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import logging
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pillow_heif
import pytest
from flask.testing import FlaskClient
from PIL import ExifTags, Image
from werkzeug.test import TestResponse

from finetune.batch_inference.predict import classify
from models.artifacts.bundle import open_bundle
from models.preprocess import Preprocessing
from service import create_app
from service.context import services_of
from service.http.errors import PROBLEM_TYPES
from service.settings import Settings
from tests.helpers.older_bundles import without_ood_score
from tests.helpers.server import LONG_TIMEOUTS, START_TIMEOUT_S, multipart, parse_metrics

pytestmark = pytest.mark.slow

pillow_heif.register_heif_opener()  # for Image.save
T = Image.Transpose
PROBLEM = "application/problem+json"


@contextlib.contextmanager
def serving(bundle: Path, **settings: Any) -> Iterator[FlaskClient]:
    """Yield a test client of the application, without a server."""
    app = create_app(Settings(bundle=bundle, **(LONG_TIMEOUTS | settings)))
    served = services_of(app).model_manager
    served.wait(START_TIMEOUT_S)
    try:
        yield app.test_client()
    finally:
        served.close()


@pytest.fixture(scope="module")
def client(tiny_bundle: SimpleNamespace) -> Iterator[FlaskClient]:
    with serving(tiny_bundle.path) as client:
        yield client


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Return an image with parts of every class and no symmetry, so that the prediction is uncertain."""
    colors = np.array([[[60, 80, 220], [220, 60, 60]], [[200, 90, 90], [60, 190, 80]]], np.uint8)
    return Image.fromarray(colors).resize((56, 44), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photo(picture: Image.Image) -> bytes:
    return encode(picture, "JPEG", quality=90)


def send(client: FlaskClient, data: bytes, content_type: str = "image/jpeg", query: str = "", **headers: str) -> TestResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(f"/predict{query}", data=data, content_type=content_type, headers=named)


def send_json(client: FlaskClient, document: object) -> TestResponse:
    return send(client, json.dumps(document).encode(), "application/json")


def send_form(client: FlaskClient, *parts: Any, query: str = "") -> TestResponse:
    return send(client, *multipart(*parts), query)


def rows(answer: TestResponse) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return answer.get_json()["predictions"]


def one(answer: TestResponse) -> dict[str, Any]:
    (row,) = rows(answer)
    return row


def same(a: dict[str, Any], b: dict[str, Any], within: float = 1e-5) -> bool:
    """Return whether two rows have the same probabilities; their file names may differ."""
    pairs = zip(a["probabilities"].values(), b["probabilities"].values(), strict=True)
    return all(abs(x - y) <= within for x, y in pairs)


def check_problem(answer: TestResponse, code: str, *words: str) -> dict[str, Any]:
    """Check that the response is a complete problem with this code, and that its detail contains the texts."""
    status, title, _ = PROBLEM_TYPES[code]
    assert (answer.status_code, answer.content_type) == (status, PROBLEM), answer.text
    problem = answer.get_json()
    assert problem.keys() == {"type", "title", "status", "detail", "code", "request_id"}
    assert (problem["code"], problem["status"], problem["title"]) == (code, status, title)
    assert problem["type"] == f"/docs#{code}"
    assert problem["request_id"] == answer.headers["X-Request-ID"]
    for word in words:
        assert word in problem["detail"]
    return problem


def encode(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


# None of the classes


@pytest.fixture(scope="module")
def black() -> bytes:
    """A photo that is unlike the training photos."""
    return encode(Image.new("RGB", (56, 44)), "PNG")


def test_a_photo_unlike_the_training_photos_gets_no_label(
    client: FlaskClient, black: bytes, tiny_bundle: SimpleNamespace
) -> None:
    rule = open_bundle(tiny_bundle.path).decision_rule
    row = one(send(client, black))
    assert (row["label"], row["because"], row["in_distribution"]) == (None, "unlike the training images", False)
    assert row["because_code"] == "unlike_training"
    assert row["ood_score"] > rule.max_ood_score
    assert row["confidence"] == max(row["probabilities"].values())
    known = one(send(client, next((tiny_bundle.photos / "red").iterdir()).read_bytes()))
    assert (known["label"], known["because"], known["in_distribution"]) == ("red", None, True)
    assert known["because_code"] is None
    assert 0 < known["ood_score"] <= rule.max_ood_score


def test_abstain_0_gives_every_photo_its_most_probable_class(client: FlaskClient, black: bytes) -> None:
    row = one(send(client, black, query="?abstain=0"))
    assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    assert (row["because"], row["in_distribution"]) == ("unlike the training images", False)
    assert row["because_code"] == "unlike_training"
    check_problem(send(client, black, query="?abstain=no"), "bad_parameter", "`abstain` must be 0 or 1 (got 'no').")


def test_photos_without_a_label_are_counted(client: FlaskClient, black: bytes) -> None:
    def count() -> float:
        name = 'classifier_abstentions_total{reason="unlike_training"}'
        return parse_metrics(client.get("/metrics").text).get(name, 0.0)

    before = count()
    send(client, black)
    assert count() == before + 1


def test_scores_equal_those_of_finetune_predict(
    client: FlaskClient, black: bytes, tmp_path: Path, tiny_bundle: SimpleNamespace
) -> None:
    (tmp_path / "black.png").write_bytes(black)
    paths = [tmp_path / "black.png", *sorted(tiny_bundle.photos.rglob("*.jpg"))[:3]]
    for path, expected in zip(paths, classify(open_bundle(tiny_bundle.path), paths), strict=True):
        assert one(send(client, path.read_bytes()))["ood_score"] == pytest.approx(expected.ood_score, rel=1e-4)


def test_an_older_bundle_answers_as_before(tiny_bundle: SimpleNamespace, black: bytes, tmp_path: Path) -> None:
    with serving(without_ood_score(tiny_bundle.path, tmp_path / "older")) as older:
        row = one(send(older, black))
        (model,) = older.get("/models").get_json()["models"]
    assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    assert (row["because"], row["in_distribution"], row["ood_score"]) == (None, None, None)
    assert (model["ood"], model["decision"]["max_ood_score"]) == (None, None)


# Accepted bodies


def test_every_kind_of_body_gets_the_same_prediction(client: FlaskClient, photo: bytes) -> None:
    plain = one(send(client, photo))
    text = base64.b64encode(photo).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    url_safe = base64.urlsafe_b64encode(photo).decode()
    assert "-" in url_safe
    assert "_" in url_safe
    forms = {
        "image/*": send(client, photo, "image/whatever"),
        "octet-stream": send(client, photo, "application/octet-stream"),
        "with a parameter": send(client, photo, "IMAGE/JPEG; charset=binary"),
        "another format than it says": send(client, photo, "image/png"),
        "multipart": send_form(client, ("file", "a.jpg", photo, "image/jpeg")),
        "another field": send_form(client, ("anything", "a.jpg", photo)),
        "a form with a text field": send_form(client, ("token", None, b"x"), ("file", "a.jpg", photo)),
        "JSON": send_json(client, {"image": text}),
        "JSON in lines": send_json(client, {"image": wrapped}),
        "JSON in indented lines": send_json(client, {"image": f"\n  {wrapped}\n".replace("\n", "\r\n  ")}),
        "data: URL": send_json(client, {"image": f"data:image/jpeg;base64,{text}"}),
        "URL-safe base64": send_json(client, {"image": url_safe}),
        "URL-safe base64 without padding": send_json(client, {"image": url_safe.rstrip("=")}),
        "base64 without padding": send_json(client, {"image": text.rstrip("=")}),
        "a data: URL in capitals": send_json(client, {"image": f"DATA:image/jpeg;BASE64,{text}"}),
        "an object": send_json(client, {"image": {"b64": text}}),
        "instances": send_json(client, {"instances": [{"b64": text}]}),
        "instances of strings": send_json(client, {"instances": [text]}),
        "instances of named inputs": send_json(client, {"instances": [{"image_bytes": {"b64": text}, "key": "1"}]}),
        "a data: URL in instances": send_json(client, {"instances": [{"b64": f"data:image/jpeg;base64,{text}"}]}),
    }
    for form, answer in forms.items():
        row = one(answer)
        assert same(row, plain), form
        assert (row["width"], row["height"], row["format"]) == (56, 44, "JPEG"), form


def test_several_images_are_predicted_in_order_with_their_names(client: FlaskClient, tiny_bundle: SimpleNamespace) -> None:
    files = [sorted((tiny_bundle.photos / label).iterdir())[2] for label in ("green", "red", "blue", "red")]
    alone = [one(send(client, file.read_bytes())) for file in files]
    parts = [("file" if i % 2 else "files[]", file.name, file.read_bytes()) for i, file in enumerate(files)]
    together = rows(send_form(client, *parts))
    assert [row["file"] for row in together] == [file.name for file in files]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    coded = [{"b64": base64.b64encode(file.read_bytes()).decode()} for file in files]
    listed = rows(send_json(client, {"instances": coded}))
    assert [row["file"] for row in listed] == [None] * 4
    assert all(same(a, b) for a, b in zip(listed, alone, strict=True))


def test_a_file_name_in_any_script_is_returned_unchanged(client: FlaskClient, photo: bytes) -> None:
    for name in ("Kätzchen.jpg", "猫 1.jpg", "a'b;c.jpg"):
        assert one(send_form(client, ("file", name, photo)))["file"] == name


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        (b"name=\"file\"; filename*=utf-8''%E6%9D%B1.jpg", "東.jpg"),
        (b"name=\"file\"; filename*=iso-8859-1'en'caf%E9.jpg", "café.jpg"),
        (b'name="file"; filename="x.jpg"; filename*=UTF-8\'\'%E6%9D%B1.jpg', "東.jpg"),
        (b'name="file"; filename="x.jpg"; filename*=nonsense\'\'a', "a"),
        (b"name=\"file\"; filename*=utf-8''%ff.jpg", "\ufffd.jpg"),
        (b'name="file"; filename*=a.jpg', "a.jpg"),
        (b'name="file"; filename="caf\xe9.jpg"', "caf\ufffd.jpg"),
        (b'name="\xe9"; filename="a.jpg"', "a.jpg"),
        (b'name="image"\r\nContent-Type: image/jpeg', None),
        (b'name="image"\r\nContent-Type: IMAGE/PNG; charset=binary', None),
    ],
)
def test_a_file_is_recognized_by_its_name_in_any_encoding_or_by_its_type(
    client: FlaskClient, photo: bytes, headers: bytes, name: str | None
) -> None:
    body = b"--x\r\nContent-Disposition: form-data; " + headers + b"\r\n\r\n" + photo + b"\r\n--x--\r\n"
    row = one(send(client, body, "multipart/form-data; boundary=x"))
    assert row["file"] == name
    assert same(row, one(send(client, photo)))


def test_a_form_without_a_file_is_rejected(client: FlaskClient, photo: bytes) -> None:
    check_problem(send_form(client, ("file", "", b"", "application/octet-stream")), "no_image")
    assert len(rows(send_form(client, ("file", "", b""), ("file", "a.jpg", photo)))) == 1
    check_problem(
        send_form(client, ("file", None, photo)),
        "no_image",
        "The field `file` is text, not a file: it has no file name.",
        "-F file=@",
    )


# Responses


def test_a_response_describes_the_image_and_the_model(client: FlaskClient, photo: bytes, tiny_bundle: SimpleNamespace) -> None:
    answer = send_form(client, ("file", "red.jpg", photo))
    bundle = open_bundle(tiny_bundle.path)
    document = answer.get_json()
    assert document.keys() == {"model", "request_id", "predictions"}
    assert document["model"] == {
        "name": bundle.name,
        "version": bundle.version,
        "precision": document["model"]["precision"],
        "preprocessing_sha256": bundle.manifest["preprocessing_sha256"],
    }
    assert document["request_id"] == answer.headers["X-Request-ID"]
    assert answer.headers["X-Model-Version"] == bundle.version
    assert re.fullmatch(r"decode;dur=[\d.]+, batch_queue;dur=[\d.]+, inference;dur=[\d.]+", answer.headers["Server-Timing"])
    (row,) = document["predictions"]
    decision = ["label", "because", "because_code", "in_distribution", "ood_score"]
    assert list(row) == ["file", *decision, "confidence", "probabilities", "width", "height", "format", "notes"]
    assert list(row["probabilities"]) == list(bundle.classes)
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert row["confidence"] == max(row["probabilities"].values()) == row["probabilities"][row["label"]]
    assert row["notes"] == []


def test_top_k_returns_the_most_probable_classes_first(client: FlaskClient, photo: bytes) -> None:
    everything = one(send(client, photo))["probabilities"]
    best = sorted(everything, key=lambda name: -everything[name])
    for k in (1, 2, 3, 4, 1_000_000):
        row = one(send(client, photo, query=f"?top_k={k}"))
        assert list(row["probabilities"]) == best[:k]
        assert row["label"] == best[0]


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two", "", "1e3", "%C2%B2", "9" * 30, "000000001" + "9" * 5000])
def test_an_invalid_top_k_is_rejected(client: FlaskClient, photo: bytes, text: str) -> None:
    check_problem(
        send(client, photo, query=f"?top_k={text}"), "bad_parameter", "`top_k` must be a whole number from 1 to 1,000,000 (got "
    )


def test_the_crop_is_the_input_of_the_network(client: FlaskClient, picture: Image.Image, tiny_bundle: SimpleNamespace) -> None:
    preprocessing = open_bundle(tiny_bundle.path).preprocessing
    data = encode(picture, "PNG")
    head, _, text = one(send(client, data, "image/png", "?crop=1"))["crop"].partition(",")
    assert head == "data:image/png;base64"
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    assert np.array_equal(seen, preprocessing.pixels(data))
    assert "crop" not in one(send(client, data, "image/png", "?crop=0"))
    check_problem(send(client, data, "image/png", "?crop=yes"), "bad_parameter", "`crop` must be 0 or 1 (got 'yes').")


def test_predictions_are_those_of_the_command_line(client: FlaskClient, tiny_bundle: SimpleNamespace) -> None:
    """Training, ``finetune predict`` and the service compute the same prediction for the same image."""
    bundle = open_bundle(tiny_bundle.path)
    tolerance = client.get("/models").get_json()["models"][0]["tolerance"]
    photos = sorted(tiny_bundle.data.glob("*/*/*.jpg"))
    assert len(photos) > 40
    for file, expected in zip(photos, classify(bundle, photos), strict=True):
        assert expected.probabilities is not None
        served = one(send(client, file.read_bytes()))["probabilities"]
        np.testing.assert_allclose([served[name] for name in bundle.classes], expected.probabilities, rtol=0, atol=tolerance)


# Kinds of images

STORED_AS = {
    1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270,
}  # fmt: skip


def test_a_rotated_image_gets_the_prediction_of_the_upright_one(client: FlaskClient, picture: Image.Image) -> None:
    upright = one(send(client, encode(picture, "PNG"), "image/png"))
    sideways = one(send(client, encode(picture.transpose(T.ROTATE_90), "PNG"), "image/png"))
    assert not same(upright, sideways, 0.01)  # otherwise the following assertions prove nothing
    for orientation, how in STORED_AS.items():
        tags = Image.Exif()
        tags[ExifTags.Base.Orientation] = orientation
        stored = picture if how is None else picture.transpose(how)
        assert same(one(send(client, encode(stored, "PNG", exif=tags), "image/png")), upright), orientation


def test_images_of_other_modes_get_the_prediction_of_their_appearance(client: FlaskClient, picture: Image.Image) -> None:
    upright = one(send(client, encode(picture, "PNG"), "image/png"))
    grey = picture.convert("L")
    plain_grey = one(send(client, encode(grey.convert("RGB"), "PNG"), "image/png"))
    deep = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257)
    see_through = picture.convert("RGBA")
    see_through.putalpha(255)
    cases: dict[str, tuple[bytes, dict[str, Any], float]] = {
        "grey": (encode(grey, "PNG"), plain_grey, 1e-5),
        "16-bit": (encode(deep, "PNG"), plain_grey, 1e-5),
        "16-bit TIFF": (encode(deep, "TIFF"), plain_grey, 1e-5),
        "RGBA": (encode(see_through, "PNG"), upright, 1e-5),
        "BMP": (encode(picture, "BMP"), upright, 1e-5),
        "PPM": (encode(picture, "PPM"), upright, 1e-5),
        "TIFF": (encode(picture, "TIFF", compression="tiff_lzw"), upright, 1e-5),
        "lossless WebP": (encode(picture, "WEBP", lossless=True), upright, 1e-5),
        "HEIC": (encode(picture, "HEIF", quality=-1, chroma=444), upright, 0.05),
        "HEIC with transparency": (encode(see_through, "HEIF", quality=-1, chroma=444), upright, 0.05),
        "HEIC of tiles": (encode(picture, "HEIF", quality=-1, chroma=444, tile_size=64), upright, 0.05),
        "AVIF": (encode(picture, "AVIF", quality=100, subsampling="4:4:4"), upright, 0.05),
        "CMYK TIFF": (encode(picture.convert("CMYK"), "TIFF"), upright, 0.02),
        "CMYK JPEG": (encode(picture.convert("CMYK"), "JPEG", quality=98), upright, 0.1),
    }
    for name, (data, requested, within) in cases.items():
        assert same(one(send(client, data, "image/x")), requested, within), name


def test_transparent_pixels_are_white(client: FlaskClient) -> None:
    white = one(send(client, encode(Image.new("RGB", (40, 40), "white"), "PNG"), "image/png"))
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([255, 0, 0] * 256)
    for data in (
        encode(Image.new("RGBA", (40, 40), (255, 0, 0, 0)), "PNG"),
        encode(Image.new("LA", (40, 40), (0, 0)), "PNG"),
        encode(palette, "PNG", transparency=0),
        encode(palette, "GIF", transparency=0),
    ):
        assert same(one(send(client, data, "image/x")), white)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_classified_with_a_note(client: FlaskClient, form: str) -> None:
    first, second = Image.new("RGB", (40, 40), (255, 40, 40)), Image.new("RGB", (40, 40), (40, 60, 255))
    lossless = {"lossless": True} if form == "WEBP" else {}
    still, moving = (
        one(send(client, data, "image/x"))
        for data in (
            encode(first, form, **lossless),
            encode(first, form, save_all=True, append_images=[second], **lossless),
        )
    )
    assert same(still, moving)
    assert still["notes"] == []
    assert moving["notes"] == ["The image has several frames. The first one was classified."]


def test_the_primary_image_of_several_is_classified_with_a_note(client: FlaskClient) -> None:
    first, second = Image.new("RGB", (40, 40), (255, 40, 40)), Image.new("RGB", (40, 40), (40, 60, 255))
    notes = {
        "HEIF": "The file contains several images. The primary one was classified.",
        "AVIF": "The image has several frames. The primary image was classified.",
    }
    for form, note in notes.items():
        still = one(send(client, encode(first, form), "image/x"))
        several = one(send(client, encode(first, form, save_all=True, append_images=[second]), "image/x"))
        assert same(still, several, 0.02)  # the frames of an AVIF are encoded together
        assert (still["format"], still["notes"], several["notes"]) == (form, [], [note])


def test_a_jpeg_of_a_phone_with_a_second_image_is_not_an_animation(client: FlaskClient, picture: Image.Image) -> None:
    row = one(send(client, encode(picture, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]), "image/jpeg"))
    assert (row["format"], row["notes"]) == ("MPO", [])
    assert same(row, one(send(client, encode(picture, "JPEG"))))


# Refusals


def test_a_request_without_an_image_is_rejected(client: FlaskClient) -> None:
    check_problem(send(client, b""), "no_image", "The request contains no image. Send multipart/form-data")
    check_problem(send(client, b"", "application/octet-stream"), "no_image")
    check_problem(send(client, b"", "application/json"), "bad_json")
    check_problem(send_form(client), "no_image")
    check_problem(send_json(client, {"instances": []}), "no_image")


def test_an_empty_file_is_rejected(client: FlaskClient) -> None:
    check_problem(send_form(client, ("file", "a.jpg", b"")), "empty_image", "The file is empty.")
    check_problem(send_json(client, {"image": ""}), "empty_image")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "video/mp4", "", "nonsense"])
def test_an_unsupported_media_type_is_rejected(client: FlaskClient, photo: bytes, kind: str) -> None:
    check_problem(
        send(client, photo, kind), "unsupported_media_type", f"Unsupported Content-Type: {kind or 'none'}. Send", "image/*"
    )


@pytest.mark.parametrize("kind", ["image/jpeg", "application/json", "multipart/form-data; boundary=x"])
def test_a_compressed_body_is_rejected_as_such(client: FlaskClient, photo: bytes, kind: str) -> None:
    name = services_of(client.application).model_manager.get().bundle.name
    for path in ("/predict", f"/v2/models/{name}/infer"):
        response = client.post(path, data=gzip.compress(photo), content_type=kind, headers={"Content-Encoding": "gzip"})
        detail = "Compressed bodies are not supported (Content-Encoding: gzip). Send it uncompressed."
        assert (response.status_code, response.get_json().get("detail", response.get_json().get("error"))) == (415, detail)
    assert rows(send(client, photo, Content_Encoding="identity"))


@pytest.mark.parametrize("data", [b"no picture", b"<html><svg></svg></html>", b"\0", b"8BPS\0\1"])
def test_data_that_is_not_an_image_is_rejected(client: FlaskClient, data: bytes) -> None:
    check_problem(send(client, data), "not_an_image", "not a supported image. Use JPEG")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(300), "JPEG 2000"),
        (b"\xffO\xffQ" + bytes(300), "JPEG 2000"),
        (b"\xff\n" + bytes(300), "JPEG XL"),
        (b"%PDF-1.7\n", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg width="5"/>', "SVG"),
        (b"\0\0\0\x14ftypisom\0\0\0\0mp42", "Video"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "Video"),
    ],
)
def test_an_unsupported_image_format_is_named(client: FlaskClient, data: bytes, name: str) -> None:
    check_problem(send(client, data), "not_an_image", f"{name} is not supported. Use JPEG")
    check_problem(send_form(client, ("file", "a", data)), "not_an_image", f"{name} is not supported. Use JPEG")


@pytest.mark.parametrize("head", [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf"])
def test_a_heic_or_avif_file_without_an_image_is_damaged(client: FlaskClient, head: bytes) -> None:
    check_problem(send(client, head + bytes(300)), "damaged_image", "damaged", "it has no still image", "Use another copy")


def test_other_formats_of_pillow_are_rejected(client: FlaskClient, picture: Image.Image) -> None:
    for form in ("EPS", "PDF", "ICO", "TGA", "JPEG2000", "DDS"):
        check_problem(send(client, encode(picture, form)), "not_an_image")


def test_a_damaged_image_is_rejected(client: FlaskClient, photo: bytes, picture: Image.Image) -> None:
    check_problem(send(client, photo[: len(photo) // 2]), "damaged_image", "damaged", "Use another copy")
    png = bytearray(encode(picture, "PNG"))
    png[len(png) // 2] ^= 0xFF
    check_problem(send(client, bytes(png)), "damaged_image")
    check_problem(send_form(client, ("file", "a.jpg", photo[:300])), "damaged_image")


def flat_png(width: int, height: int) -> bytes:
    """Return a PNG of one color with this many pixels: a few kB for a hundred million."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    line = b"\0" * ((width + 7) // 8 + 1)
    lines = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # models.preprocess ignores it outside of tests
def test_an_image_with_too_many_pixels_is_rejected_before_decoding(client: FlaskClient) -> None:
    bomb = flat_png(10_000, 10_000)
    assert len(bomb) < 50_000
    check_problem(
        send(client, bomb, "image/png"),
        "too_many_pixels",
        "The photo is 100 megapixels; the limit is 50. Resize it and try again.",
    )
    check_problem(send(client, flat_png(20_000, 20_000), "image/png"), "too_many_pixels")
    assert rows(send(client, flat_png(5_000, 5_000), "image/png"))


def test_the_limit_of_pixels_is_a_setting(tiny_bundle: SimpleNamespace) -> None:
    with serving(tiny_bundle.path, max_megapixels=0.01) as client:
        assert rows(send(client, flat_png(100, 100), "image/png"))
        check_problem(
            send(client, flat_png(100, 101), "image/png"),
            "too_many_pixels",
            "The photo is 0.0101 megapixels; the limit is 0.01.",
        )


def test_a_body_that_is_too_large_is_rejected(tiny_bundle: SimpleNamespace, photo: bytes) -> None:
    with serving(tiny_bundle.path, max_body_mb=0.01) as client:
        assert len(photo) < 0.01 * 2**20
        assert rows(send(client, photo))
        check_problem(send(client, bytes(10_486)), "body_too_large", "Upload too large: 10.3 KB, the limit is 10.2 KB.")


def test_too_many_images_are_rejected(tiny_bundle: SimpleNamespace, photo: bytes) -> None:
    with serving(tiny_bundle.path, max_images=3) as client:
        assert len(rows(send_form(client, *[("file", "a.jpg", photo)] * 3))) == 3
        message = "Too many images: 4 images, the limit is 3."
        check_problem(send_form(client, *[("file", "a.jpg", photo)] * 4), "too_many_images", message)
        check_problem(
            send_form(client, *[("file", "a.jpg", b"x")] * 200),
            "too_many_images",
            "Too many images: more than 35 parts, the limit is 3.",
        )
        check_problem(send_json(client, {"instances": [{"b64": "eA=="}] * 4}), "too_many_images", message)
        check_problem(
            send_json(client, {"instances": [{}] * 400}), "too_many_images", "Too many images: 400 images, the limit is 3."
        )
        check_problem(
            send_json(client, {"instances": [{}] * 100_000}),
            "json_too_large",
            "The JSON has 100,002 lists and objects, the limit is 1,048.",
        )


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b"null", b'"text"', b"{}", b'{"image": null}', b'{"image": 5}', b'{"image": ["a"]}',
        b'{"instances": {}}', b'{"instances": null}', b'{"instances": [5]}', b'{"instances": [{"b64": 5}]}',
        b'{"instances": [{}]}', b'{"image": "eA==", "instances": ["eA=="]}', b"\xff\xfe\x00",
        b"[" * 1_000, b'{"a":' * 1_000, b'{"image": ' + b"9" * 10_000 + b"}",
    ],
)  # fmt: skip
def test_invalid_json_is_rejected(client: FlaskClient, body: bytes) -> None:
    check_problem(send(client, body, "application/json"), "bad_json")


@pytest.mark.parametrize("text", ["?", "abcde", "a=b=", "eA ==", "ü", "data:image/png;base64,!!!!", "eA==eA=="])
def test_invalid_base64_is_rejected(client: FlaskClient, text: str) -> None:
    check_problem(send_json(client, {"image": text}), "bad_base64", "base64")
    check_problem(send_json(client, {"instances": [{"b64": text}]}), "bad_base64", "base64")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"anything", "multipart/form-data"),
        (b"anything", "multipart/form-data; boundary="),
        (b"anything", "multipart/form-data; boundary=x"),
        (b"--x\r\n", "multipart/form-data; boundary=x"),
        (b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc', "multipart/form-data; boundary=x"),
        (b"--x\r\nnonsense\r\n\r\nabc\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\n\r\nabc\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\n\xff\xfe: \xff\r\n\r\nabc\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: attachment\r\n\r\nabc\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\n" + b"A: b\r\n" * 5000 + b"\r\nabc\r\n--x--\r\n", "multipart/form-data; boundary=x"),
    ],
)
def test_an_invalid_form_is_rejected(client: FlaskClient, body: bytes, kind: str) -> None:
    answer = send(client, body, kind)
    assert answer.get_json()["code"] in ("bad_form", "no_image")
    check_problem(answer, answer.get_json()["code"])


def test_one_bad_image_of_several_has_an_error_of_its_own(client: FlaskClient, photo: bytes) -> None:
    parts = [("file", name, data) for name, data in (("a", photo), ("b", b"no"), ("c", photo), ("d", b""), ("e", photo[:200]))]
    first, second, third, fourth, fifth = rows(send_form(client, *parts))
    assert same(first, third)
    for row, code in ((second, "not_an_image"), (fourth, "empty_image"), (fifth, "damaged_image")):
        assert row.keys() == {"file", "error"}
        assert row["error"].keys() == {"type", "title", "status", "detail", "code"}
        assert (row["error"]["code"], row["error"]["status"]) == (code, PROBLEM_TYPES[code][0])
    text = base64.b64encode(photo).decode()
    listed = rows(send_json(client, {"instances": [{"b64": "?"}, {"b64": text}, 5]}))
    assert [row.get("error", {}).get("code") for row in listed] == ["bad_base64", None, "bad_json"]


def test_several_bad_images_have_an_error_each(client: FlaskClient) -> None:
    answered = rows(send_form(client, ("file", "a", b"no"), ("file", "b", b"nor this")))
    assert [row["error"]["code"] for row in answered] == ["not_an_image"] * 2


def test_an_unknown_path_is_not_found(client: FlaskClient) -> None:
    for answer in (client.get("/nowhere"), client.post("/predict/"), client.get("/%ff%fe")):
        check_problem(answer, "not_found", "does not exist", "GET /docs")


def test_a_request_to_upgrade_the_connection_is_served_without_it(client: FlaskClient, photo: bytes) -> None:
    for protocol in ("websocket", "h2c"):
        assert rows(send(client, photo, Connection="Upgrade", Upgrade=protocol))


def test_an_unsupported_method_is_not_allowed(client: FlaskClient) -> None:
    answer = client.get("/predict")
    check_problem(answer, "method_not_allowed", "GET is not allowed on /predict")
    assert set(answer.headers["Allow"].split(", ")) == {"POST", "OPTIONS"}
    check_problem(client.post("/models"), "method_not_allowed")
    check_problem(client.open("/predict", method="BREW"), "method_not_allowed")


def test_an_internal_error_is_logged_and_not_disclosed(
    tiny_bundle: SimpleNamespace, photo: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: object, pixels: object) -> None:
        raise ZeroDivisionError("the secret of the engine")

    with serving(tiny_bundle.path) as client:
        with monkeypatch.context() as patch:
            patch.setattr("models.runtime.openvino_engine.OpenVINOEngine.run", fail)
            answer = send(client, photo, X_Request_ID="mine-7")
        problem = check_problem(answer, "internal_error")
        assert "secret" not in answer.text
        assert "ZeroDivision" not in answer.text
        assert problem["request_id"] == "mine-7"
        (record,) = [record for record in caplog.records if record.exc_info]
        assert record.request_id == "mine-7"
        assert "the secret of the engine" in str(record.exc_info[1])
        assert rows(send(client, photo))


def test_a_request_beyond_the_capacity_is_rejected(tiny_bundle: SimpleNamespace, photo: bytes) -> None:
    with serving(tiny_bundle.path, max_in_flight=4, max_images=4) as client:
        admission = services_of(client.application).admission
        assert len(rows(send_form(client, *[("file", "a", photo)] * 4))) == 4
        admission.acquire(1)
        answer = send_form(client, *[("file", "a", photo)] * 4)  # the request is admitted as one image, and contains four
        check_problem(answer, "overloaded", "The server is at capacity (2 of 4 images in flight). Retry in 1 s.")
        assert "classifier_in_flight_images 1.0" in client.get("/metrics").text
        admission.acquire(3)
        answer = send(client, photo, X_Request_ID="full")
        assert (
            check_problem(answer, "overloaded", "The server is at capacity (4 of 4 images in flight).")["request_id"] == "full"
        )
        assert answer.headers["Retry-After"] == "1"
        assert client.get("/health/ready").status_code == 200
        admission.release(4)
        assert rows(send(client, photo))
        assert admission.in_flight == 0


# Headers and logs


def test_a_valid_request_id_is_kept(client: FlaskClient, photo: bytes) -> None:
    for given in ("a", "A-b_c.d:9", "x" * 64):
        answer = send(client, photo, X_Request_ID=given)
        assert answer.headers["X-Request-ID"] == answer.get_json()["request_id"] == given
    made = set()
    for odd in ("", " ", "x" * 65, "a b", "<script>", "ä", "a,b"):
        answer = send(client, photo, X_Request_ID=odd)
        made.add(answer.headers["X-Request-ID"])
    assert all(re.fullmatch(r"[0-9a-f]{32}", name) for name in made)
    assert len(made) == 7


SECURE = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def test_every_response_has_security_headers(tiny_bundle: SimpleNamespace, photo: bytes) -> None:
    with serving(tiny_bundle.path, max_in_flight=1, max_images=1) as client:
        admission = services_of(client.application).admission
        answers = [
            send(client, photo),
            send(client, b"no"),
            client.get("/nowhere"),
            client.get("/predict"),
            client.get("/health/live"),
            client.get("/metrics"),
            client.options("/predict"),
        ]
        admission.acquire()
        answers.append(send(client, photo))
        assert [answer.status_code for answer in answers] == [200, 415, 404, 405, 200, 200, 200, 503]
        for answer in answers:
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Request-ID"]
            for name, value in SECURE.items():
                assert answer.headers.getlist(name) == [value], (answer.status, name)


def test_only_listed_origins_may_send_cross_origin_requests(tiny_bundle: SimpleNamespace, photo: bytes) -> None:
    mine, other = "https://cats.example", "https://dogs.example"

    def allowed(client: FlaskClient, origin: str) -> list[str | None]:
        requests = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
        answers = [
            client.options("/predict", headers={"Origin": origin, **requests}),
            send(client, photo, Origin=origin),
            send(client, b"no", Origin=origin),
        ]
        return [answer.headers.get("Access-Control-Allow-Origin") for answer in answers]

    with serving(tiny_bundle.path) as client:
        assert allowed(client, mine) == [None] * 3
    with serving(tiny_bundle.path, cors_origins=("*",)) as client:
        assert allowed(client, mine) == ["*"] * 3
    with serving(tiny_bundle.path, cors_origins=(mine, "https://x.example"), api_keys=("secret-1",)) as client:
        assert allowed(client, mine) == [mine] * 3
        assert allowed(client, other) == [None] * 3
        preflight = client.options("/predict", headers={"Origin": mine, "Access-Control-Request-Method": "POST"})
        assert preflight.status_code == 200  # without a key: browsers send none
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        assert {"Authorization", "Content-Type", "X-API-Key"} <= set(
            preflight.headers["Access-Control-Allow-Headers"].split(", ")
        )
        answer = send(client, photo, Origin=mine, X_API_Key="secret-1")
        assert "Origin" in answer.headers["Vary"]
        assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]
        assert "Access-Control-Allow-Origin" not in client.get("/models", headers={"Origin": mine}).headers


def test_an_overload_is_readable_by_other_origins(tiny_bundle: SimpleNamespace, photo: bytes) -> None:
    """Without the header a browser hides the response, and the page cannot tell it from an unreachable server."""
    with serving(tiny_bundle.path, cors_origins=("https://cats.example",), max_in_flight=1, max_images=1) as client:
        services_of(client.application).admission.acquire()
        answer = send(client, photo, Origin="https://cats.example")
        check_problem(answer, "overloaded")
        assert answer.headers["Access-Control-Allow-Origin"] == "https://cats.example"
        assert "Access-Control-Allow-Origin" not in send(client, photo, Origin="https://dogs.example").headers


def test_a_key_is_required_if_keys_are_set(
    tiny_bundle: SimpleNamespace, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="service.request")
    with serving(tiny_bundle.path, api_keys=("ann:key-of-ann", "key-without-name")) as client:
        assert rows(send(client, photo, Authorization="Bearer key-of-ann"))
        assert rows(send(client, photo, Authorization="bearer key-of-ann"))
        assert rows(send(client, photo, X_API_Key="key-of-ann"))
        assert rows(send(client, photo, X_API_Key="key-without-name"))
        for headers in ({}, {"Authorization": "Bearer"}, {"X_API_Key": ""}):
            answer = send(client, photo, **headers)
            check_problem(answer, "unauthorized", "An API key is required. Send it as `Authorization: Bearer KEY`")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        for headers in (
            {"X_API_Key": "ann"},
            {"X_API_Key": "ann:key-of-ann"},
            {"X_API_Key": "key-of-ann "[:-2]},
            {"X_API_Key": "schlüssel"},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic a2V5LW9mLWFubg=="},
        ):
            check_problem(send(client, photo, **headers), "unauthorized")
        check_problem(send(client, b"no photo, and no key"), "unauthorized")
        assert client.get("/health/ready").status_code == 200
    named = [record.key_name for record in caplog.records if record.name == "service.request" and record.status == 200]
    assert named[:4] == ["ann", "ann", "ann", "key"]
    assert "key-of" not in caplog.text + str([vars(record) for record in caplog.records])


def test_the_log_has_the_request_and_nothing_of_the_image(
    client: FlaskClient, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    send_form(client, ("file", "Annas-Hund.jpg", photo), query="?top_k=1")
    send_form(client, ("file", "Annas-Hund.jpg", photo[:100]))
    send_form(client, ("file", "Annas-Hund.jpg", b"a secret text"))
    send(client, b'{"image": "a secret text"}', "application/json", X_Request_ID="last")
    lines = [vars(record) for record in caplog.records if record.name == "service.request"]
    assert [(line["status"], line["code"]) for line in lines] == [
        (200, None), (422, "damaged_image"), (415, "not_an_image"), (400, "bad_base64"),
    ]  # fmt: skip
    for line in lines:
        assert (line["method"], line["path"], line["client"], line["key_name"]) == ("POST", "/predict", "127.0.0.1", None)
        assert line["duration_ms"] > 0
    assert lines[-1]["request_id"] == "last"
    everything = str([vars(record) for record in caplog.records])
    assert "Annas" not in everything
    assert "secret" not in everything


def test_unknown_methods_are_counted_as_one(client: FlaskClient) -> None:
    """Each label of a metric stays in memory, so clients must not be able to create labels."""
    for i in range(20):
        client.open("/predict", method=f"ODD{i}")
    assert "ODD" not in client.get("/metrics").get_data(as_text=True)


# Other routes


def test_models_describes_the_active_model(client: FlaskClient, tiny_bundle: SimpleNamespace) -> None:
    (model,) = client.get("/models").get_json()["models"]
    bundle = open_bundle(tiny_bundle.path)
    assert (model["name"], model["version"], model["classes"]) == (bundle.name, bundle.version, list(bundle.classes))
    given = model["preprocessing"] | {name: tuple(model["preprocessing"][name]) for name in ("mean", "std")}
    assert Preprocessing(**given).sha256() == model["preprocessing_sha256"]
    assert model["golden_difference"] <= model["tolerance"]
    assert model["card"] == (tiny_bundle.path / "README.md").read_text(encoding="utf-8")
    assert model["metrics"] == bundle.manifest["metrics"]


def test_health(client: FlaskClient, tiny_bundle: SimpleNamespace) -> None:
    assert client.get("/health/live").get_json() == {"status": "alive"}
    ready = client.get("/health/ready").get_json()
    assert (ready["status"], ready["model"]["version"]) == ("ready", open_bundle(tiny_bundle.path).version)


def test_the_service_is_live_but_not_ready_until_the_model_is_loaded(
    tiny_bundle: SimpleNamespace, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.inference.model_manager.ModelManager._load", lambda self: None)
    client = create_app(Settings(bundle=tiny_bundle.path)).test_client()
    assert client.get("/health/live").status_code == 200
    for answer in (client.get("/health/ready"), client.get("/models"), send(client, photo)):
        check_problem(answer, "not_ready", "being loaded")
        assert answer.headers["Retry-After"] == "1"
