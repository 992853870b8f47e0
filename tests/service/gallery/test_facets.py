"""Columns of a table of labels over HTTP: as filters, on a photo's page and in exports."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from urllib.parse import quote, urlencode

import pytest

from models.artifacts.bundle import open_bundle
from models.artifacts.predictions import Predictions
from service.db.connection import Database
from service.db.ingest import EvaluationTable, get_or_create_model, import_predictions
from tests.helpers.server import Server, poll, serve

pytestmark = pytest.mark.slow

SITES = ("north & east", "<south>", "=1+1", "")


@pytest.fixture(scope="module")
def table(tiny_bundle: SimpleNamespace) -> Predictions:
    """The bundle's own predictions, with columns of a table."""
    own = Predictions.read_csv(tiny_bundle.predictions)
    count = len(own.labels)
    facets = {
        "site": tuple(SITES[i % 4] for i in range(count)),
        "age": tuple(str(20 + i) for i in range(count)),
        "id": tuple(f"scan-{i}" for i in range(count)),
    }
    return replace(own, groups=tuple(f"patient {i // 2}" for i in range(count)), facets=facets)


@pytest.fixture(scope="module")
def server(tiny_bundle: SimpleNamespace, table: Predictions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    url = f"sqlite:///{tmp_path_factory.mktemp('facets') / 'reviews.db'}"
    bundle = open_bundle(tiny_bundle.path)
    database = Database(url)
    flags = table.labels < 0
    with database.write() as connection:
        model = get_or_create_model(connection, version=bundle.version, name=bundle.name, classes=bundle.classes)
        import_predictions(connection, model, EvaluationTable("evaluation", "0" * 64, table, flags, flags, flags))
    database.close()
    with serve(tiny_bundle.path, data_dir=tiny_bundle.data, database_url=url) as running:
        poll(lambda: running.get("/gallery").status == 200)
        yield running


def text(server: Server, path: str) -> str:
    answer = server.get(path)
    assert answer.status == 200, (path, answer.status, answer.body[:300])
    return answer.body.decode()


def facets(page: str) -> dict[str, dict[str, tuple[int, str]]]:
    """Return the columns of a grid's sidebar: the count and the link of each value."""
    found = {}
    for section in re.findall(r'<section class="facet" aria-labelledby="facet-column-\d+">.*?</section>', page, re.DOTALL):
        title = re.search(r"<h3[^>]*><bdi>(.*?)</bdi>", section)
        assert title
        choices = re.findall(
            r'<a class="choice[^"]*" href="([^"]*)".*?class="choice-name"><bdi>(.*?)</bdi>.*?class="count">([\d,]+)',
            section,
            re.DOTALL,
        )
        found[html.unescape(title[1])] = {
            html.unescape(name): (int(number), html.unescape(address)) for address, name, number in choices
        }
    return found


def test_the_grid_has_a_filter_for_each_column_with_few_values(server: Server, table: Predictions) -> None:
    found = facets(text(server, "/gallery/photos"))
    expected = Counter(value or "(empty)" for value in table.facets["site"])
    assert {name: number for name, (number, _) in found["site"].items()} == expected
    assert len(found["age"]) == 5
    assert all(name.startswith(("up to ", "over ")) for name in found["age"])
    assert "id" not in found


def test_a_filter_shows_its_photos_and_can_be_removed(server: Server, table: Predictions) -> None:
    _, address = facets(text(server, "/gallery/photos"))["site"]["<south>"]
    page = text(server, address)
    matching = [name for name, site in zip(table.image_names, table.facets["site"], strict=True) if site == "<south>"]
    assert page.count('<li class="tile ') == len(matching)
    assert f": {len(matching)} photos, site = &lt;south&gt;, highest loss first</h1>" in page
    assert "<south>" not in page
    (number, removal) = facets(page)["site"]["<south>"]
    assert number == len(matching)
    assert "facet=" not in removal
    assert '<span class="chip-title">site</span> <bdi>&lt;south&gt;</bdi>' in page
    both = text(server, facets(page)["site"]["north & east"][1])
    assert both.count('<li class="tile ') == sum(site in SITES[:2] for site in table.facets["site"])


def test_counts_of_other_facets_follow_the_filter(server: Server, table: Predictions) -> None:
    page = text(server, "/gallery/photos?" + urlencode({"facet": "site:(empty)"}))
    total = sum(not site for site in table.facets["site"])
    assert sum(number for number, _ in facets(page)["age"].values()) == total
    assert sum(number for number, _ in facets(page)["site"].values()) == len(table.labels)


def test_a_photo_has_all_of_its_columns(server: Server, table: Predictions) -> None:
    page = text(server, f"/gallery/photo?photo={quote(table.image_names[0])}")
    for name, value in (("group", "patient 0"), ("site", "north &amp; east"), ("age", "20"), ("id", "scan-0")):
        assert f"<dt><bdi>{name}</bdi></dt><dd><bdi>{value}</bdi></dd>" in page
    page = text(server, f"/gallery/photo?photo={quote(table.image_names[3])}")
    assert "<bdi>site</bdi>" not in page


def test_exports_have_the_columns(server: Server, table: Predictions) -> None:
    rows = json.loads(text(server, "/gallery/photos.json?facet=site:north+%26+east&sort=name"))["rows"]
    expected = {name: i for i, name in enumerate(table.image_names) if table.facets["site"][i] == SITES[0]}
    assert {row["photo"] for row in rows} == set(expected)
    for row in rows:
        i = expected[row["photo"]]
        values = {"group": table.groups[i]} | {name: values[i] for name, values in table.facets.items()}
        assert row["columns"] == values
    exported = list(csv.DictReader(io.StringIO(text(server, "/gallery/photos.csv"))))
    assert len(exported) == len(table.labels)
    for row in exported:
        i = table.image_names.index(row["photo"])
        assert (row["group"], row["facet_id"]) == (table.groups[i], f"scan-{i}")
        assert row["facet_site"] == table.facets["site"][i].replace("=1", "'=1")


def test_pages_with_intervals_state_that_they_do_not_allow_for_groups(server: Server) -> None:
    note = (
        "The photos come in groups, such as those of one patient. The intervals on this page count them as independent, so "
        'they are too narrow. <code class="inline-code">finetune evaluate</code> allows for the groups.'
    )
    for path in ("/gallery", "/gallery/threshold"):
        assert note in text(server, path)


def test_a_filter_with_an_unknown_value_has_no_photos(server: Server) -> None:
    page = text(server, "/gallery/photos?facet=site:west")
    assert "No matching photos." in page
