"""Production photos in the gallery, labeled or not, are distinguished from evaluated ones."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.helpers.odd_images import saved
from tests.helpers.server import Server, poll, serve
from tests.helpers.tiny_network import paint

pytestmark = pytest.mark.slow

Row = dict[str, Any]
DECISIONS = ("label:red", "label:blue", "neither", "bad")
SENT = 6
FORMATS = {0: "HEIF", 1: "AVIF", 4: "HEIF"}  # of some of the photos


@dataclass(frozen=True)
class Gallery:
    """A service with production photos, the first of them reviewed as in DECISIONS. ``rows`` are all photos it shows."""

    server: Server
    rows: list[Row]

    def text(self, path: str) -> str:
        answer = self.server.get(path)
        assert answer.status == 200, (path, answer.body[:300])
        return answer.body.decode()

    def live(self, *, decision: str = "") -> list[Row]:
        """Return the production photos with this decision, or all of them."""
        found = [row for row in self.rows if row["source"] == "production"]
        return [row for row in found if not decision or (row["decision"] or {}).get("decision") == decision]


@pytest.fixture(scope="module")
def gallery(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    folder: Path = tmp_path_factory.mktemp("production")
    url = f"sqlite:///{folder / 'reviews.db'}"
    with serve(tiny_bundle.path, data_dir=tiny_bundle.data, database_url=url, save_predictions=1) as server:
        poll(lambda: server.get("/gallery").status == 200)
        for number in range(SENT):
            photo = paint(folder / "sent.jpg", (255, 40, 40), seed=900 + number)
            with Image.open(photo) as image:
                assert server.post(saved(image, FORMATS.get(number, "JPEG"))).status == 200
        path = "/gallery/photos.json?source=production&sort=name"
        sent = poll(lambda: len(rows := server.get(path).json()["rows"]) == SENT and rows)
        for row, decision in zip(sent, DECISIONS, strict=False):
            given = json.dumps({"photo": row["photo"], "sha256": row["sha256"], "decision": decision}).encode()
            assert server.post(given, "application/json", path="/gallery/review").status == 200
        yield Gallery(server, server.get("/gallery/photos.json").json()["rows"])


def plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", text)).split())


def test_an_unlabeled_photo_is_not_a_mistake_in_the_matrix(gallery: Gallery) -> None:
    text = gallery.text("/gallery/photos")
    cell = r'<td class="([\w-]+) shade-\d">\s*<a href="[^"]*" title="([^"]*?)(?: predicted as|, predicted) (\w+)">([\d,]+)<'
    cells = re.findall(cell, text)
    kinds = {(label, predicted): kind for kind, label, predicted, _ in cells}
    assert {label for label, _ in kinds} >= {"unlabeled", "red"}
    for (label, predicted), kind in kinds.items():
        assert kind == ("unlabeled" if label == "unlabeled" else "diagonal" if label == predicted else "off")
    unlabeled = sum(int(number) for kind, *_, number in cells if kind == "unlabeled")
    assert unlabeled == SENT - len(gallery.live(decision="label"))


def test_a_reviewed_photo_is_not_queued_for_labeling(gallery: Gallery) -> None:
    for decision, words in (("neither", "None of the classes"), ("bad", "Excluded")):
        (row,) = gallery.live(decision=decision)
        page = gallery.text(row["page"])
        assert re.search(r'<p class="outcome-mark excluded"><svg.*?</svg>Excluded</p>', page, re.DOTALL)
        grid = gallery.text(f"/gallery/photos?source=production&review={decision}")
        assert re.search(r'<span class="outcome-mark excluded"><svg.*?</svg>Excluded</span>', grid, re.DOTALL)
        assert re.search(rf'<span class="badge reviewed"><svg.*?</svg>{words}</span>', grid, re.DOTALL)
        for text in (page, grid):
            assert "No label yet" not in plain(text)
            assert "unlabeled" not in plain(text.split('<table class="matrix')[0])
    waiting = SENT - len(DECISIONS)
    home = gallery.text("/gallery")
    address, number = re.findall(r'<dt>No label yet</dt><dd><a href="([^"]*)">(\d+)</a>', home)[0]
    assert int(number) == waiting
    assert f": {waiting} unlabeled photos, " in gallery.text(html.unescape(address))


def test_the_accuracy_covers_evaluated_photos_and_production_ones_are_counted_separately(gallery: Gallery) -> None:
    text = gallery.text("/gallery")
    evaluated = [row for row in gallery.rows if row["source"] != "production"]
    right = sum(row["label"] == row["predicted"] for row in evaluated)
    figures = dict(re.findall(r"<dt>([^<]*)</dt><dd>(?:<a [^>]*>)?([^<]*)", text))
    assert figures["Accuracy"] == f"{right / len(evaluated):.2%}"
    labelled = gallery.live(decision="label")
    right_live = sum(row["label"] == row["predicted"] for row in labelled)
    assert (len(labelled), right_live) == (2, 1)
    assert (
        f"The accuracy is that of the {len(evaluated)} evaluated photos only. Of 2 labeled production photos, 1 is correct."
        " Hand-picked photos are not a representative sample." in plain(text)
    )
    assert (figures["Correct"], figures["Incorrect"]) == (str(right + 1), str(len(evaluated) - right + 1))
    address = re.findall(r'<a href="([^"]*)">2 labeled production photos', text)[0]
    assert ": 2 photos (correct or incorrect) from production" in gallery.text(html.unescape(address))


def test_a_production_photo_has_no_label_to_confirm(gallery: Gallery) -> None:
    """The first button is the prediction. The buttons keep their positions when the photo is labeled."""
    for row in gallery.live():
        buttons = re.findall(r'<button [^>]*value="label:\w+"[^>]*>(.*?)</button>', gallery.text(row["page"]), re.DOTALL)
        by_probability = sorted(row["probabilities"], key=row["probabilities"].get, reverse=True)
        expected = [f"Label as: {by_probability[0]} (predicted)", f"Label as: {by_probability[1]}"]
        assert [plain(words.split("<kbd")[0]) for words in buttons] == expected


def test_a_production_photo_shows_when_it_arrived_and_sorts_by_newest(gallery: Gallery) -> None:
    rows = gallery.server.get("/gallery/photos.json?source=production&sort=newest").json()["rows"]
    times = [row["received_at"] for row in rows]
    assert len(times) == SENT
    assert times == sorted(times, reverse=True)
    received = rf'<time datetime="{re.escape(times[0])}">\d{{4}}-\d\d-\d\d \d\d:\d\d UTC</time>'
    assert re.search(rf"<dt>Received</dt> <dd>{received}</dd>", gallery.text(rows[0]["page"]))
    assert re.search(rf"Production <span>{received}</span>", gallery.text("/gallery/photos?source=production&sort=newest"))


def test_photos_of_any_format_are_shown_as_jpeg_or_png(gallery: Gallery) -> None:
    """Most browsers do not show HEIC."""
    for row in gallery.live():
        page = gallery.text(row["page"])
        addresses = {html.unescape(url) for url in re.findall(r'(?:src|href)="(/gallery/images/[^"]*)"', page)}
        assert {"original.jpg", "crop.png"} <= {url.split("?")[0].rpartition("/")[2] for url in addresses}
        for url in {*addresses, row["thumbnail"]}:
            answer = gallery.server.get(url)
            expected = b"\xff\xd8\xff" if ".jpg?" in url else b"\x89PNG"
            assert (answer.status, answer.body.startswith(expected)) == (200, True), url
