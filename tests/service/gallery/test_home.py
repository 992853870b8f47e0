"""The landing page's queues and commands, and the comparison of two models."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from flask import Flask
from sqlalchemy import delete, insert, select

from models.artifacts.bundle import MANIFEST, Bundle, open_bundle, write_bundle
from service.context import EXTENSION
from service.db.aggregates import FacetCounts
from service.db.connection import Database
from service.db.filter import UNLABELED
from service.db.ingest import get_or_create_model
from service.db.production import ServedPrediction, save_predictions
from service.db.schema import facet_columns, models
from service.gallery.commands import retrain_command, serve_both_command
from service.settings import Settings
from tests.helpers.server import Server, poll, serve

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Gallery:
    """A service without a photo folder that has the active model and one that was trained a year before it."""

    server: Server
    active: Bundle
    earlier: Bundle
    database_url: str

    def text(self, path: str) -> str:
        answer = self.server.get(path)
        assert answer.status == 200, (path, answer.status)
        return answer.body.decode()


@pytest.fixture(scope="module")
def gallery(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    folder = tmp_path_factory.mktemp("home")
    active = open_bundle(tiny_bundle.path)
    earlier = copy_bundle(active, folder / "earlier", name="earlier", year=-1, shuffle=True)
    url = f"sqlite:///{folder / 'reviews.db'}"
    with serve(active.path, evaluations=earlier.path, database_url=url) as server:
        poll(lambda: server.get("/gallery").status == 200)
        yield Gallery(server, active, earlier, url)


def copy_bundle(bundle: Bundle, path: Path, *, name: str, year: int = 0, shuffle: bool = False) -> Bundle:
    """Copy a bundle under another name, trained ``year`` years later, with the predictions of two classes swapped."""
    fields = json.loads(json.dumps({k: v for k, v in bundle.manifest.items() if k not in ("format", "files", "sha256")}))
    created = fields["provenance"]["created"]
    fields["provenance"]["created"] = f"{int(created[:4]) + year}{created[4:]}"

    def write_files(folder: Path) -> None:
        shutil.copytree(bundle.path, folder, dirs_exist_ok=True)
        (folder / MANIFEST).unlink()
        if shuffle:
            table = folder / "predictions.csv"
            header, *rows = table.read_text(encoding="utf-8").splitlines()
            columns = header.split(",")
            a, b = columns.index("p_blue"), columns.index("p_red")
            for number, row in enumerate(rows):
                cells = row.split(",")
                if number % 3 == 0:
                    cells[a], cells[b] = cells[b], cells[a]
                values = {name: float(cell) for name, cell in zip(columns, cells, strict=True) if name.startswith("p_")}
                cells[columns.index("predicted")] = max(values, key=lambda name: values[name]).removeprefix("p_")
                rows[number] = ",".join(cells)
            table.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")

    return write_bundle(path, {**fields, "name": name}, write_files=write_files)


def words(text: str) -> str:
    """Return the text of a part of a page."""
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", text).split()))


def queue(text: str, title: str) -> str:
    sections = re.findall(r'<section class="queue".*?</section>', text, re.DOTALL)
    return next(section for section in sections if f">{title}</a>" in section)


# Queues


def test_without_a_folder_a_queue_is_a_table_with_a_link_to_each_photo(gallery: Gallery) -> None:
    text = gallery.text("/gallery")
    assert "Photo missing" not in text
    assert "Start the service with <code>DATA_DIR</code> set to the evaluated folder." in text
    rows = re.findall(r"<tr>(.*?)</tr>", queue(text, "Least certain"), re.DOTALL)
    assert words(rows[0]) == "Photo Label Predicted Confidence"
    for row in rows[1:]:
        address = html.unescape(re.findall('href="([^"]*)"', row)[0])
        photo, label, predicted, _ = words(row).split()
        shown = gallery.server.get(address).body.decode()
        assert f"<title>{photo}" in shown
        assert predicted in shown
        assert label in gallery.active.classes
    assert len(rows) == 1 + 8


def test_a_queue_shows_its_progress_and_leads_to_the_next_unreviewed_photo(gallery: Gallery) -> None:
    version = gallery.earlier.version
    page = f"/gallery?model={version}"
    title = "Mistakes, highest loss first"
    photos = gallery.server.get(f"/gallery/incorrect.json?model={version}").json()["rows"]
    assert f"0 of {len(photos)} reviewed. Next unreviewed" in words(queue(gallery.text(page), title))
    assert "Review the mistakes" in words(gallery.text(page))
    for done, photo in enumerate(photos, 1):
        body = {"photo": photo["photo"], "sha256": photo["sha256"], "model": version, "decision": f"label:{photo['label']}"}
        saved = gallery.server.post(json.dumps(body).encode(), "application/json", path="/gallery/review")
        assert saved.status == 200
        text = gallery.text(page)
        section = queue(text, title)
        assert f"{done} of {len(photos)} reviewed." in words(section)
        following = re.findall('<a href="([^"]*)">Next unreviewed</a>', section)
        if done < len(photos):
            query = parse_qs(urlsplit(html.unescape(following[0])).query)
            assert query["sha256"] == [photos[done]["sha256"]]
            assert query["review"] == ["unreviewed"]
            assert photo["photo"].rpartition("/")[2] not in section
        else:
            assert following == []
        (button,) = re.findall('<a class="button main" href="([^"]*)">Review the mistakes</a>', text)
        assert ("/gallery/photo?" in button) == (done < len(photos))
    assert f"Retrain with {len(photos)} reviews" in words(gallery.text(page))


def test_production_photos_of_another_model_have_a_queue_until_they_are_reviewed(
    gallery: Gallery, tiny_bundle: SimpleNamespace
) -> None:
    data = [path.read_bytes() for path in sorted(tiny_bundle.photos.rglob("*.jpg"))[1:3]]  # not reviewed above
    database = Database(gallery.database_url)
    with database.write() as connection:
        earlier, classes = gallery.earlier, gallery.earlier.classes
        model = get_or_create_model(connection, version=earlier.version, name=earlier.name, classes=classes)
        odds = np.array([0.2, 0.7, 0.1], np.float32)
        served = [ServedPrediction(item, hashlib.sha256(item).hexdigest(), odds, datetime.now(timezone.utc)) for item in data]
        save_predictions(connection, model, classes, served)
    database.close()
    title = f"Production photos predicted by {earlier.name} ({earlier.version})"
    for reviewed in range(len(data)):
        section = queue(gallery.text("/gallery"), title)
        assert f"{title} {len(data)} photos" in words(section)
        assert f"{reviewed} of {len(data)} reviewed." in words(section)
        address = html.unescape(re.findall(r'<li><a class="thumb [^"]*" href="([^"]*)"', section)[0])
        query = parse_qs(urlsplit(address).query)
        assert (query["model"], query["source"]) == ([earlier.version], ["production"])
        body = {"photo": query["photo"][0], "sha256": query["sha256"][0], "model": earlier.version, "decision": "neither"}
        saved = gallery.server.post(json.dumps(body).encode(), "application/json", path="/gallery/review")
        assert saved.status == 200
    assert title not in html.unescape(gallery.text("/gallery"))
    assert "Production photos" in words(gallery.text(f"/gallery?model={earlier.version}"))


@pytest.mark.parametrize(
    ("confusion", "expected"),
    [
        ({("cats", "cats"): 95, ("dogs", "cats"): 5}, False),  # always the most frequent class
        ({("cats", "cats"): 47, ("dogs", "dogs"): 48, ("cats", "dogs"): 5}, True),
        ({(UNLABELED, "cats"): 100}, False),
        ({}, False),
    ],
)
def test_a_model_at_chance_reports_no_label_issues(confusion: dict[tuple[str, str], int], expected: bool) -> None:
    assert FacetCounts(confusion=Counter(confusion)).can_judge_labels is expected


# Commands


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flask:
    monkeypatch.chdir(tmp_path)
    app = Flask(__name__)
    app.extensions[EXTENSION] = SimpleNamespace(settings=Settings(data_dir=Path("my photos")))
    return app


def test_the_command_names_a_new_run_each_time(app: Flask, tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_bundle.path)
    runs = []
    with app.app_context():
        for number in (1, 2, 3):
            command = retrain_command(bundle, has_extra_data=number > 1)
            assert command.startswith("finetune train 'my photos' --backbone tiny ")
            assert ("--extra-data production" in command) == (number > 1)
            runs.append(command.rpartition("--output-dir ")[2])
            Path(runs[-1]).mkdir(parents=True)
            assert serve_both_command(bundle).startswith(f"BUNDLE={runs[-1]}/bundle EVALUATIONS={bundle.path} ")
    assert runs == [f"runs/{bundle.name}-reviewed", f"runs/{bundle.name}-reviewed-2", f"runs/{bundle.name}-reviewed-3"]


def test_the_command_names_the_table_of_a_model_that_was_trained_on_one(app: Flask, tiny_bundle: SimpleNamespace) -> None:
    bundle = open_bundle(tiny_bundle.path)
    manifest = json.loads(json.dumps(bundle.manifest))
    manifest["provenance"]["dataset"]["labels"] = {"rows": 54}
    with app.app_context():
        assert "--labels" not in retrain_command(bundle, has_extra_data=False)
        command = retrain_command(replace(bundle, manifest=manifest), has_extra_data=False)
    assert command.startswith("finetune train 'my photos' --backbone tiny --labels LABELS ")


def test_the_command_trains_a_logistic_head_again(app: Flask, tiny_bundle: SimpleNamespace) -> None:
    manifest = json.loads(json.dumps(open_bundle(tiny_bundle.path).manifest))
    config = manifest["provenance"]["config"]
    config |= dict.fromkeys(("epochs", "optimizer", "lr", "momentum", "weight_decay", "lr_schedule"))
    config |= {"head": "logistic", "normalization": "unit", "penalty": None}
    with app.app_context():
        command = retrain_command(replace(open_bundle(tiny_bundle.path), manifest=manifest), has_extra_data=False)
    assert "--backbone tiny --head logistic --normalization unit --batch-size 5 --seed 0 --reviews reviews.csv" in command


@pytest.mark.parametrize(
    ("name", "run"), [("a-reviewed", "a-reviewed-2"), ("a-reviewed-9", "a-reviewed-10"), ("b c", "'runs/b c")]
)
def test_a_retrained_model_is_numbered(app: Flask, tiny_bundle: SimpleNamespace, tmp_path: Path, name: str, run: str) -> None:
    bundle = copy_bundle(open_bundle(tiny_bundle.path), tmp_path / "copy", name=name)
    with app.app_context():
        assert run in retrain_command(bundle, has_extra_data=False).rpartition("--output-dir ")[2]


def test_the_command_belongs_to_the_model_that_is_shown(gallery: Gallery) -> None:
    for model in (gallery.active, gallery.earlier):
        text = gallery.text(f"/gallery?model={model.version}")
        assert f"--output-dir runs/{model.name}-reviewed</code>" in text


# Comparison


def test_the_earlier_model_is_the_baseline_and_a_link_swaps_them(gallery: Gallery) -> None:
    text = gallery.text("/compare")
    first, second = gallery.earlier, gallery.active
    dates = {model.version: model.manifest["provenance"]["created"][:10] for model in (gallery.active, gallery.earlier)}
    shown = re.findall(r"<dt>(Baseline|Candidate): <bdi>(.*?)</bdi> <code>(\w+)</code></dt>\s*<dd>(.*?)</dd>", text, re.DOTALL)
    assert [row[:3] for row in shown] == [
        ("Baseline", first.name, first.version),
        ("Candidate", second.name, second.version),
    ]
    for _, _, version, figures in shown:
        assert re.match(r"[\d.]+%", figures)
        assert f"Trained on {dates[version]}" in figures
    swap = html.unescape(re.findall('<a class="button" href="([^"]*)">Swap</a>', text)[0])
    assert parse_qs(urlsplit(swap).query) == {"a": [second.version], "b": [first.version]}
    swapped = gallery.text(swap)
    assert re.findall(r"<dt>(?:Baseline|Candidate): <bdi>.*?</bdi> <code>(\w+)</code>", swapped) == [
        second.version,
        first.version,
    ]


def test_the_summary_names_the_better_model_and_the_significance(gallery: Gallery) -> None:
    outcome = gallery.server.get(f"/compare.json?a={gallery.earlier.version}&b={gallery.active.version}").json()
    fixed = outcome["fixed"]
    assert (fixed > 0, outcome["broke"]) == (True, 0)
    assert outcome["summary"] == (
        f"The models disagree on {fixed} photos. The candidate is right on all {fixed}."
        f" {'Statistically' if outcome['p_value'] < 0.05 else 'Not statistically'} significant"
        f" (p = {outcome['p_value']:.2g}, McNemar's exact test)."
    )


# Keys


def test_photos_in_groups_are_stated_where_they_count_as_independent(gallery: Gallery) -> None:
    note = "The photos come in groups"
    sentence = "The test counts the photos of a group as independent."
    for path in ("/gallery", "/gallery/threshold", "/compare", "/compare.json"):
        assert note not in (page := gallery.text(path))
        assert sentence not in page
    database = Database(gallery.database_url)
    group = facet_columns.c.name == "group"
    with database.write() as connection:
        model = connection.execute(select(models.c.id).where(models.c.version == gallery.earlier.version)).scalar_one()
        connection.execute(insert(facet_columns).values(model_id=model, name="group"))
    try:
        assert note not in gallery.text("/gallery")
        assert note in (page := gallery.text("/compare"))
        assert sentence in page
        assert json.loads(gallery.text("/compare.json"))["summary"].endswith(sentence)
    finally:
        with database.write() as connection:
            connection.execute(delete(facet_columns).where(group))
        database.close()


def test_a_browser_can_forget_its_key(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'reviews.db'}"
    kind = "application/x-www-form-urlencoded"
    with serve(tiny_bundle.path, database_url=url, api_keys="ann:sesame") as server:
        poll(lambda: server.get("/gallery").status == 200)
        button = '<button class="button small" name="key" value="">Forget key</button>'
        signed_in = server.post(b"key=sesame", kind, path="/gallery/key")
        cookie = signed_in.headers["Set-Cookie"].partition(";")[0]
        assert cookie == "api_key=sesame"
        for path in ("/", "/gallery", "/model"):
            assert button in server.get(path, headers={"Cookie": cookie}).body.decode()
            assert button not in server.get(path).body.decode()
        forgotten = server.post(b"key=", kind, path="/gallery/key", headers={"Cookie": cookie})
        assert (forgotten.status, forgotten.headers["Location"]) == (303, "/gallery")
        assert forgotten.headers["Set-Cookie"].startswith("api_key=; Expires=Thu, 01 Jan 1970")
