"""Photos that look alike over HTTP: by similarity, on the map, and near duplicates as one card."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest

from models.artifacts.bundle import open_bundle
from models.artifacts.evaluation import EVALUATED, write_evaluation
from models.artifacts.predictions import Predictions
from models.artifacts.similarity import MAP_SIZE, DuplicateRow, SimilarityIndex
from tests.helpers.server import Response, Server, poll, serve, serve_gallery

pytestmark = pytest.mark.slow

Row = dict[str, Any]


@pytest.fixture(scope="module")
def server(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_gallery(tiny_bundle, tmp_path_factory.mktemp("similar")) as server:
        yield server


@pytest.fixture(scope="module")
def table(tiny_bundle: SimpleNamespace) -> SimilarityIndex:
    return SimilarityIndex.read(tiny_bundle.path)


def rows(server: Server, **query: str) -> list[Row]:
    return list(server.get(f"/gallery/photos.json?{urlencode(query)}").json()["rows"])


def text(reply: Response) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", reply.body.decode())).split())


def test_all_photos_that_look_like_one_are_selected(server: Server, table: SimilarityIndex) -> None:
    embeddings = table.embeddings.astype(np.float32)
    counts = set()
    for percent in (0, 70, 99):
        expected = {table.sha256s[i] for i in np.flatnonzero(embeddings @ embeddings[0] >= percent / 100)} | {table.sha256s[0]}
        query = {"similar": table.sha256s[0], "min_similarity": str(percent)}
        assert {row["sha256"] for row in rows(server, **query)} == expected
        counts.add(len(expected))
        page = server.get(f"/gallery/photos?{urlencode(query)}&select=all")
        assert f"All {len(expected)} photo" in text(page)
        assert f'type="number" name="min_similarity" min="0" max="100" value="{percent}"' in page.body.decode()
    assert len(counts) > 1
    row = next(row for row in rows(server) if row["sha256"] == table.sha256s[0])
    page = server.get(f"/gallery/photo?{urlencode({'photo': row['photo'], 'sha256': row['sha256']})}")
    link = re.search(r'<a href="([^"]+)">Select all photos that look like this one</a>', page.body.decode())
    assert link
    assert f"{len(rows(server, similar=row['sha256']))} photos" in text(server.get(html.unescape(link[1])))


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ({"similar": "x"}, 400, "similar must be the SHA-256 of a photo (got 'x')."),
        ({"similar": "0" * 64}, 404, "The photo has no embedding in an evaluation on this machine."),
        ({"min_similarity": "101"}, 400, "min_similarity must be a whole number from 0 to 100"),
        ({"duplicates": "some"}, 400, "duplicates must be collapse or the SHA-256 of a photo"),
        ({"region": "ab:1,1:2,2"}, 400, "region must be a polygon"),
        ({"region": "ab:1,1:2,2:3,1"}, 404, "The map ab is of no evaluation on this machine."),
        ({"select": "some"}, 400, "Valid values: page, all."),
    ],
)
def test_an_invalid_selection_is_rejected(server: Server, query: dict[str, str], status: int, message: str) -> None:
    reply = server.get(f"/gallery/photos?{urlencode(query)}")
    assert (reply.status, message in text(reply)) == (status, True), text(reply)


def test_the_map_has_a_point_for_each_photo_and_a_region_leads_to_the_grid(server: Server, table: SimilarityIndex) -> None:
    page = server.get("/gallery/map")
    assert (page.status, "The map needs JavaScript." in text(page)) == (200, True)
    document = server.get("/gallery/map.json").json()
    photos = {row["sha256"]: row for row in rows(server)}
    assert len(document["id"]) == len(photos) == len(table.sha256s)
    x, y = np.array(document["x"]), np.array(document["y"])
    assert (min(x.min(), y.min()), max(x.max(), y.max())) == (1, MAP_SIZE - 1)
    one = server.get(f"/gallery/map/photo.json?id={document['id'][0]}").json()
    own = next(row for row in photos.values() if row["photo"] == one["photo"])
    assert (one["label"], one["predicted"], one["thumbnail"]) == (own["label"], own["predicted"], own["thumbnail"])
    assert server.get(one["page"]).status == 200
    middle = int(np.median(x))
    region = f"{document['map']}:0,0:{middle},0:{middle},{MAP_SIZE}:0,{MAP_SIZE}"
    inside = {table.sha256s[i] for i, (left, _) in enumerate(table.points) if left < middle}
    assert 0 < len(inside) < len(photos)
    assert {row["sha256"] for row in rows(server, region=region)} == inside
    assert server.get("/gallery/map.json?map=none").code == "not_found"
    assert server.get("/gallery/map/photo.json?id=x").code == "bad_parameter"
    assert server.get("/gallery/map/photo.json?id=999999").code == "not_found"
    assert server.get("/gallery/map?zoom=2").status == 400
    assert 'href="/gallery/map"' in server.get("/gallery").body.decode()


# Near duplicates and odd files of another evaluation

ODD = ("dark", "", "blurred, odd size", "", "", "")


@pytest.fixture(scope="module")
def evaluated(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that also shows an evaluation of six photos, among them two groups of near duplicates and two odd files."""
    folder = tmp_path_factory.mktemp("evaluation")
    bundle = open_bundle(tiny_bundle.path, files=())
    names = tuple(f"test/red/{i}.jpg" for i in range(6))
    sha256s = tuple(f"{i:064x}" for i in range(6))
    probabilities = np.tile([0.2, 0.5, 0.3], (6, 1)) + np.arange(6)[:, None] * [-0.01, 0.01, 0]
    splits = ("test",) * 6
    table = Predictions(bundle.classes, names, np.full(6, 1), probabilities, splits, sha256s, odd_files=ODD)
    table.write_csv(folder / "predictions.csv")
    groups = (1, 1, 1, 2, 2)
    duplicates = tuple(DuplicateRow(group, names[i], "red", "test", sha256s[i]) for i, group in enumerate(groups))
    SimilarityIndex(sha256s, np.eye(6, dtype=np.float16), duplicates).write(folder)
    write_evaluation(folder, bundle, kind=EVALUATED, classes=bundle.classes, split="test", temperature=1.0)
    url = f"sqlite:///{folder / 'reviews.db'}"
    with serve(tiny_bundle.path, data_dir=tiny_bundle.data, database_url=url, evaluations=folder) as server:
        poll(lambda: server.get("/gallery/photos.json").status == 200)
        yield server


def test_near_duplicates_are_one_card_that_opens_the_group(evaluated: Server) -> None:
    view = {"split": "test", "sort": "name"}
    assert [Path(row["photo"]).stem for row in rows(evaluated, **view, duplicates="collapse")] == ["0", "3", "5"]
    reverse = rows(evaluated, **view, order="desc", duplicates="collapse")
    assert [Path(row["photo"]).stem for row in reverse] == ["5", "4", "2"]
    page = evaluated.get(f"/gallery/photos?{urlencode(view)}&duplicates=collapse").body.decode()
    cards = re.findall(r'<a class="group-size" href="([^"]+)"[^>]*>(\d+)<', page)
    assert [count for _, count in cards] == ["3", "2"]
    group = evaluated.get(html.unescape(cards[0][0]))
    assert re.findall(r'title="test/red/(\d).jpg"', group.body.decode()) == ["0", "1", "2"]
    assert "Near duplicates as one" in evaluated.get(f"/gallery/photos?{urlencode(view)}").body.decode()


def test_odd_files_are_a_queue_and_a_filter(evaluated: Server) -> None:
    home = evaluated.get("/gallery").body.decode()
    link = re.search(r'<a href="([^"]+)">Odd files</a>', home)
    assert link
    assert "Dark, blurred, odd size. Exclude what training should not see." in home
    page = evaluated.get(html.unescape(link[1]))
    assert sorted(re.findall(r'title="test/red/(\d).jpg"', page.body.decode())) == ["0", "2"]
    [row] = rows(evaluated, facet="odd file:blurred")
    assert (row["photo"], row["columns"]) == ("test/red/2.jpg", {"odd file": "blurred, odd size"})
    lines = evaluated.get("/gallery/photos.csv?split=test&sort=name").body.decode().splitlines()
    assert lines[0].endswith(",odd_file")
    assert lines[3].endswith('"blurred, odd size"')


def test_each_evaluation_has_a_map_of_its_own(evaluated: Server) -> None:
    page = evaluated.get("/gallery/map").body.decode()
    names = dict(re.findall(r'map=([0-9a-f]+)"[^>]*>(Validation photos|Evaluation of test)', page))
    assert sorted(names.values()) == ["Evaluation of test", "Validation photos"]
    for name, title in names.items():
        points = evaluated.get(f"/gallery/map.json?map={name}").json()
        assert len(points["id"]) == (6 if title == "Evaluation of test" else 18)


# The index itself


def test_the_points_follow_the_principal_components() -> None:
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(300, 2)) * [5, 1]
    rotation, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    embeddings = (np.hstack([spread, np.zeros((300, 14))]) @ rotation + 3).astype(np.float16)
    index = SimilarityIndex(tuple(f"{i:064x}" for i in range(300)), embeddings)
    for axis in (0, 1):
        correlation = np.corrcoef(index.points[:, axis], spread[:, axis])[0, 1]
        assert abs(correlation) > 0.999
    assert index.points.min() == 1
    assert index.points.max() == MAP_SIZE - 1
    for few in range(3):
        assert SimilarityIndex(index.sha256s[:few], embeddings[:few, :1]).points.shape == (few, 2)


def test_a_point_is_inside_a_polygon_by_the_even_odd_rule() -> None:
    embeddings = np.stack(np.meshgrid(np.arange(20), np.arange(20)), -1).reshape(-1, 2).astype(np.float16)
    index = SimilarityIndex(tuple(map(str, range(400))), embeddings)
    triangle = [(0, 0), (MAP_SIZE + 1, 0), (0, MAP_SIZE + 1)]
    x, y = index.points.T
    assert index.inside(triangle) == np.flatnonzero(x + y < MAP_SIZE + 1).tolist()
    bow_tie = [(0, 0), (MAP_SIZE, MAP_SIZE), (MAP_SIZE, 0), (0, MAP_SIZE)]
    assert 0 < len(index.inside(bow_tie)) < len(index.inside([(0, 0), (MAP_SIZE, 0), (MAP_SIZE, MAP_SIZE), (0, MAP_SIZE)]))


def test_groups_are_found_by_sha256(tmp_path: Path) -> None:
    rows = tuple(DuplicateRow(1, f"{i}.jpg", "cats", "valid", f"{i:064x}") for i in range(2))
    index = SimilarityIndex(tuple(row.sha256 for row in rows), np.eye(2, dtype=np.float16), rows)
    index.write(tmp_path)
    assert SimilarityIndex.read(tmp_path).groups == {rows[0].sha256: 1, rows[1].sha256: 1}
    assert index.similar_to(0, 0.5) == [0]
    assert index.similar_to(0, 0.0) == [0, 1]
