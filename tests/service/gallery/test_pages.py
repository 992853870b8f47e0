"""The gallery's listing pages: every number is recounted from the tables and every link followed, also in a browser."""

from __future__ import annotations

import csv
import html
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import numpy as np
import pytest
from playwright.sync_api import Browser, expect
from scipy.stats import binomtest

from models.artifacts.bundle import PREDICTIONS, open_bundle
from models.artifacts.evaluation import OUT_OF_FOLD, write_evaluation
from models.artifacts.predictions import Predictions
from models.artifacts.similarity import SIMILARITY_FILES
from service.db.connection import Database
from service.db.ingest import EvaluationTable, get_or_create_model, import_predictions
from service.gallery.sidebar import page_numbers
from tests.helpers.browser import DESKTOP, FAILED_REQUEST, PHONE, NewPage, check_accessibility, open_pages
from tests.helpers.server import Server, poll, serve

pytestmark = pytest.mark.slow

MORE = 100
Row = dict[str, str]


@dataclass(frozen=True)
class Gallery:
    """A service that shows ``rows``: the bundle's own predictions, and generated ones whose photos are in no folder."""

    server: Server
    rows: list[Row]
    classes: tuple[str, ...]
    version: str

    def text(self, path: str) -> str:
        answer = self.server.get(path)
        assert answer.status == 200, (path, answer.status, answer.body[:300])
        return answer.body.decode()

    def total(self, path: str) -> int:
        """Return the number at the start of the grid's text."""
        found = re.search(r'<h1 class="grid-title"[^>]*>[^<]*?: ([\d,]+) ', self.text(path))
        assert found, path
        return int(found[1].replace(",", ""))


@pytest.fixture(scope="module")
def gallery(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    folder = tmp_path_factory.mktemp("gallery")
    bundle = open_bundle(tiny_bundle.path)
    url = f"sqlite:///{folder / 'reviews.db'}"
    generated = generate(bundle.classes)
    generated.write_csv(folder / "generated.csv")
    database = Database(url)
    with database.write() as connection:
        model = get_or_create_model(connection, version=bundle.version, name=bundle.name, classes=bundle.classes)
        flags = np.arange(MORE) % 10 == 0
        import_predictions(
            connection,
            model,
            EvaluationTable("out-of-fold", "0" * 64, generated, np.roll(flags, 1), flags, np.zeros_like(flags)),
        )
    database.close()
    rows = read(tiny_bundle.path / "predictions.csv", "evaluation") + read(folder / "generated.csv", "out-of-fold")
    with serve(tiny_bundle.path, data_dir=tiny_bundle.data, database_url=url) as server:
        poll(lambda: server.get("/gallery").status == 200)
        yield Gallery(server, rows, bundle.classes, bundle.version)


def outcome_of(rows: list[Row], percent: int, predicted: str = "") -> tuple[int, int, int]:
    """Count the photos without a label, and the correct and incorrect ones with a label."""
    own = [row for row in rows if predicted in ("", row["predicted"])]
    kept = [row for row in own if confidence(row) >= percent]
    right = sum(map(is_right, kept))
    return len(own) - len(kept), right, len(kept) - right


def generate(classes: tuple[str, ...]) -> Predictions:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(classes), MORE)
    probabilities = rng.dirichlet(np.full(len(classes), 0.7), MORE)
    for i in range(MORE // 2):  # a model that is better than chance
        best = probabilities[i].argmax()
        probabilities[i, [labels[i], best]] = probabilities[i, [best, labels[i]]]
    probabilities[0] = np.where(np.arange(len(classes)) == labels[0], 1 - 1e-9, 1e-9 / (len(classes) - 1))
    names = tuple(f"train/{classes[label]}/more.{i:03d}.jpg" for i, label in enumerate(labels))
    return Predictions(classes, names, labels, probabilities, ("train",) * MORE, tuple(rng.bytes(32).hex() for _ in names))


def read(path: Path, source: str) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row | {"source": source} for row in csv.DictReader(file)]


def is_right(row: Row) -> bool:
    return row["label"] == row["predicted"]


def confidence(row: Row) -> float:
    return 100 * max(float(value) for name, value in row.items() if name.startswith("p_"))


def links(text: str) -> list[str]:
    return [html.unescape(address) for address in re.findall(r'<a [^>]*?href="([^"#]+)"', text)]


def choices(text: str, facet: str) -> dict[str, tuple[int, str]]:
    """Return the values of a facet -> the count and the link of each."""
    section = re.search(rf'<section class="facet" aria-labelledby="facet-{facet}">.*?</section>', text, re.DOTALL)
    assert section, facet
    found = {}
    for address, inner in re.findall(r'<a class="choice[^"]*" href="([^"]*)"[^>]*>(.*?)</a>', section[0], re.DOTALL):
        name = re.search(r'class="choice-name"><bdi>([^<]*)', inner)
        number = re.search(r'class="count">([\d,]+)', inner)
        assert name
        assert number
        found[html.unescape(name[1])] = (int(number[1].replace(",", "")), html.unescape(address))
    return found


# Counts


def test_the_landing_page_has_the_counts_of_the_tables(gallery: Gallery) -> None:
    text = gallery.text("/gallery")
    rows = gallery.rows
    right = sum(map(is_right, rows))
    figures = dict(re.findall(r"<dt>([^<]*)</dt><dd>(?:<a [^>]*>)?([^<]*)", text))
    assert figures["Correct"] == str(right)
    assert figures["Incorrect"] == str(len(rows) - right)
    assert figures["All photos"] == str(len(rows))
    assert figures["Reviewed"] == "0"
    assert figures["Accuracy"] == f"{right / len(rows):.2%}"
    interval = binomtest(right, len(rows)).proportion_ci(method="wilson")
    assert f"<small>{right} of {len(rows)}; 95% interval {interval.low:.1%} to {interval.high:.1%}</small>" in text
    queues = {
        name: (int(number), html.unescape(address))
        for address, name, number in re.findall(
            r'<h3 id="queue-\d+"><a href="([^"]*)">([^<]*)</a> <span class="pill">(\d+)', text
        )
    }
    called = Counter(row["predicted"] for row in rows)
    expected = {
        "Mistakes, highest loss first": len(rows) - right,
        "Least certain": len(rows),
        "Random sample of mistakes": len(rows) - right,
        "Random sample of correct predictions": right,
        "Possible label errors": MORE // 10,
        "Near duplicates with different labels": MORE // 10,
    }
    assert {name: number for name, (number, _) in queues.items()} == expected
    by_class = re.search(r'<ul class="class-links">.*?</ul>', text, re.DOTALL)
    assert by_class
    links_of = re.findall(r'<a href="([^"]*)"><bdi>(\w+)</bdi></a> <span class="count">(\d+)</span>', by_class[0])
    assert {name: int(number) for _, name, number in links_of} == called
    queues |= {name: (int(number), html.unescape(address)) for address, name, number in links_of}
    for name, (number, address) in queues.items():
        assert gallery.total(address) == number, name
    for row in re.findall(r'<ul class="strip">.*?</ul>', text, re.DOTALL):
        assert 1 <= row.count("<li>") <= 8


@pytest.mark.parametrize("query", ["", "outcome=incorrect", "class=red&class=blue&confidence=50-90"])
def test_facets_confusions_and_bars_have_the_counts_of_their_links(gallery: Gallery, query: str) -> None:
    given = parse_qs(query)
    low, high = map(int, given.get("confidence", ["0-100"])[0].split("-"))

    def fits(row: Row, but: str = "") -> bool:
        return (
            low <= confidence(row) < (high if high < 100 else 101)
            and (but == "class" or row["label"] in given.get("class", [row["label"]]))
            and (but == "outcome" or "outcome" not in given or not is_right(row))
        )

    rows = [row for row in gallery.rows if fits(row)]
    text = gallery.text(f"/gallery/photos?{query}")
    assert gallery.total(f"/gallery/photos?{query}") == len(rows)

    for facet, value in (
        ("class", lambda row: row["label"]),
        ("predicted", lambda row: row["predicted"]),
        ("outcome", lambda row: "Correct" if is_right(row) else "Incorrect"),
        ("source", lambda row: {"evaluation": "Evaluation", "out-of-fold": "Out-of-fold"}[row["source"]]),
        ("split", lambda row: row["split"]),
    ):
        expected = Counter(value(row) for row in gallery.rows if fits(row, but=facet))
        if len({value(row) for row in gallery.rows}) < 2:  # there is nothing to choose
            assert f'"facet-{facet}"' not in text
            continue
        found = choices(text, facet)
        assert {name: number for name, (number, _) in found.items() if number} == expected, facet
        assert list(found) == list(choices(gallery.text("/gallery/photos"), facet)), "a filter moved a choice"
        for name, (number, address) in found.items():
            if not given:
                assert gallery.total(address) == number, (facet, name)

    counted = Counter((row["label"], row["predicted"]) for row in rows)
    cells = re.findall(
        r'<td class="(diagonal|off) shade-\d">\s*<a href="([^"]*)" title="(\w+) predicted as (\w+)">([\d,]+)<', text, re.DOTALL
    )
    assert {(label, called): int(number) for _, _, label, called, number in cells} == counted
    for kind, address, label, called, number in cells:
        assert (kind == "diagonal") == (label == called)
        assert gallery.total(html.unescape(address)) == int(number)

    bars = re.findall(r'<a href="([^"]*)" aria-label="(\d+)% to (\d+)%: ([\d,]+) photo', text)
    assert sum(int(number) for *_, number in bars) == len(rows)
    for address, start, end, number in bars:
        inside = [row for row in rows if int(start) <= confidence(row) < (int(end) if int(end) < 100 else 101)]
        assert int(number) == len(inside) == gallery.total(html.unescape(address))


def test_each_page_shows_its_slice_of_the_order_and_the_last_the_rest(gallery: Gallery) -> None:
    highest_first = sorted(gallery.rows, key=lambda row: -float(row["loss"]))
    expected = [row["photo"] for row in highest_first]
    shown: list[str] = []
    for page in range(1, -(-len(expected) // 24) + 1):
        text = gallery.text(f"/gallery/photos?per_page=24&page={page}")
        tiles = re.findall(r'<span class="tile-name" title="([^"]*)"', text)
        first = len(shown)
        shown += tiles
        assert f'<p class="range-shown">{first + 1}\u2013{len(shown)} <span class="quiet">of {len(expected)}</span>' in text
        assert f'aria-current="page"><span class="visually-hidden">Page </span>{page}</a>' in text
    assert sorted(shown) == sorted(expected)
    assert shown[:5] == expected[:5]


def test_a_card_shows_both_labels_with_their_probabilities(gallery: Gallery) -> None:
    row = max(gallery.rows, key=lambda row: float(row["loss"]))
    text = gallery.text("/gallery/incorrect?per_page=24")
    tile = re.findall(r'<li class="tile.*?</dl>', text, re.DOTALL)[0]
    words = " ".join(re.sub(r"<[^>]*>", " ", tile).replace("\u202f", "").split())
    assert f"Incorrect {Path(row['photo']).name} Label {row['label']}" in words
    assert f"Predicted {row['predicted']} {confidence(row):.1f}%" in words
    assert 'width="320" height="240" loading="lazy"' in tile


def test_no_probability_is_rounded_to_100_percent(gallery: Gallery) -> None:
    """One probability is so close to 1 that it is stored as 1."""
    query = "/gallery/photos{}?sort=confidence"
    row = gallery.server.get(query.format(".json")).json()["rows"][0]
    assert max(row["probabilities"].values()) == 1
    for path in ("/gallery", query.format(""), row["page"]):
        text = re.sub(
            r'<figure class="histogram">.*?</figure>|<span id="zoom">100%</span>', "", gallery.text(path), flags=re.DOTALL
        )
        assert "&gt;99.9%" in text
        assert not re.search(r"\b100(\.0)?%|\D0\.0%", text), path
    assert "&lt;0.1%" in gallery.text(row["page"])


# Links and forms


@pytest.mark.parametrize("outcome", ["correct", "incorrect"])
def test_the_first_button_confirms_the_label_and_the_second_accepts_the_prediction(gallery: Gallery, outcome: str) -> None:
    row = gallery.server.get(f"/gallery/photos.json?outcome={outcome}").json()["rows"][-1]
    page = gallery.text(row["page"])
    bar = re.search(r'id="actions".*?class="class-search"', page, re.DOTALL)[0]  # type: ignore[index]
    buttons = re.findall(r'<button ([^>]*)><span class="action-text">(.*?)</span>(?:<kbd|</button>)', bar)
    words = [" ".join(re.sub(r"<[^>]*>", "", text).split()) for _, text in buttons]
    if outcome == "incorrect":
        assert words == [f"Keep label: {row['label']}", f"Change to: {row['predicted']} (predicted)"]
    else:
        assert words == [f"Keep label: {row['label']} (predicted)", "Prediction matches label"]
        assert "disabled" in buttons[1][0]
        link = re.findall(r"data-explain=\"label\"><bdi>(\w+)</bdi> <small>(.*?)</small>", page)
        assert link == [(row["label"], "label and prediction")]
    assert re.findall(r'<option value="(\w+)">', page) == sorted(gallery.classes)


@pytest.mark.parametrize(
    "path", ["/gallery", "/gallery/photos?per_page=24&page=2", "/gallery/incorrect?sort=random", "/compare"]
)
def test_every_link_has_a_page(gallery: Gallery, path: str) -> None:
    text = gallery.text(path)
    found = {address for address in links(text) if "/gallery/photo?" not in address}
    found |= set([address for address in links(text) if "/gallery/photo?" in address][:3])
    assert len(found) >= 5
    for address in found:
        assert gallery.server.get(address).status == 200, address


def test_forms_lead_to_their_filter(gallery: Gallery) -> None:
    answer = gallery.server.get("/gallery/photos?class=red&sort_by=margin.asc&per_page=24&min_confidence=40&max_confidence=95")
    assert answer.status == 302
    query = parse_qs(urlsplit(answer.headers["Location"]).query)
    assert query == {
        "model": [gallery.version],
        "class": ["red"],
        "confidence": ["40-95"],
        "sort": ["margin"],
        "per_page": ["24"],
    }
    assert gallery.server.get(answer.headers["Location"]).status == 200


def test_a_listing_accepts_the_query_of_any_page_and_returns_the_complete_filter(gallery: Gallery) -> None:
    page = "class=red&sort_by=margin.asc&per_page=24&min_confidence=40&max_confidence=95&page=2"
    whole = gallery.server.get("/gallery/photos.json?class=red&sort=margin&confidence=40-95").json()
    assert whole["total"] == len(whole["rows"]) > 0
    assert gallery.server.get(f"/gallery/photos.json?{page}").json() == whole
    assert gallery.server.get(f"/gallery/photos.csv?{page}").body.count(b"\n") == 1 + whole["total"]
    assert gallery.server.get("/gallery/photos.json?from=95&to=40").status == 400


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        ("90", "50", "The minimum must be lower than the maximum."),
        ("50", "50", "The minimum must be lower than the maximum."),
        ("-1", "50", "must be a whole number from 0 to 100"),
        ('"><b>', "50", "must be a whole number from 0 to 100"),
    ],
)
def test_an_invalid_range_is_reported_next_to_its_fields(gallery: Gallery, low: str, high: str, words: str) -> None:
    query = {"model": gallery.version, "predicted": "red", "confidence": "40-95"}
    answer = gallery.server.get(f"/gallery/photos?{urlencode(query | {'min_confidence': low, 'max_confidence': high})}")
    text = answer.body.decode()
    assert (answer.status, answer.headers["Content-Type"]) == (400, "text/html; charset=utf-8")
    before = gallery.text(f"/gallery/photos?{urlencode(query)}")
    for part in (r'<h1 class="grid-title".*?</h1>', r'<ol class="tiles".*?</ol>'):
        assert re.search(part, text, re.DOTALL)[0] == re.search(part, before, re.DOTALL)[0]  # type: ignore[index]
    form = re.search(r'<form class="range".*?</form>', text, re.DOTALL)[0]  # type: ignore[index]
    assert words in form
    fields = {
        html.unescape(name): html.unescape(value) for name, value in re.findall(r'name="(\w+)"[^>]*? value="([^"]*)"', form)
    }
    assert fields == query | {"min_confidence": low, "max_confidence": high}
    assert form.count('aria-invalid="true" aria-describedby="range-error"') == 2
    assert '<details class="filters" id="filters" open>' in text
    assert gallery.server.get("/gallery/photos.json?confidence=90-50").headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        (
            "/gallery?colour=red",
            400,
            "Unknown parameter &#34;colour&#34;. The only parameter is model, the version of a model.",
        ),
        ("/gallery?model=unknown", 404, "no predictions of a model"),
        ("/gallery/photos?class=zebra", 400, "The classes of the model are"),
        ("/gallery/photos?sort_by=size", 400, "it can be loss.asc"),
        ("/gallery/photos?page=0", 400, "a whole number from 1"),
        ("/gallery/photos?per_page=1000", 400, "from 24 to 96"),
        ("/gallery/correct?sort=size", 400, "Valid values: loss"),
        ("/compare?c=1", 400, "Unknown parameter &#34;c&#34;. Valid parameters: a, b (versions of models)."),
    ],
)
def test_an_invalid_query_is_explained_in_one_sentence(gallery: Gallery, path: str, status: int, words: str) -> None:
    answer = gallery.server.get(path)
    assert answer.status == status
    assert answer.headers["Content-Type"].startswith("text/html")
    alert = re.search(r'role="alert".*?</div>', answer.body.decode(), re.DOTALL)
    assert alert
    assert words in alert[0]


def test_an_error_page_shows_the_code_and_a_link_back(gallery: Gallery) -> None:
    def message(path: str, referrer: str = "") -> tuple[str, str]:
        answer = gallery.server.get(path, headers={"Referer": referrer} if referrer else {})
        body = answer.body.decode()
        link = re.search(r'<p><a href="([^"]*)">[^<]*</a></p>', body)
        assert (answer.status, link is not None) == (400, True)
        return body, html.unescape(link[1])  # type: ignore[index]

    here = gallery.server.url
    body, link = message("/gallery/photos?page=<b>`1`</b>")
    assert "(got &#39;&lt;b&gt;<code>1</code>&lt;/b&gt;&#39;)." in body
    assert "<code>page</code> must be a whole number from 1 to" in body
    assert link == "/gallery"
    assert message("/gallery?colour=red")[1] == "/gallery"
    before = f"{here}/gallery/photos?class=red&sort=margin"
    assert message("/gallery/photos?page=0", before)[1] == before
    assert message("/gallery/photos?page=0", f"{here}/gallery/photos?page=0")[1] == "/gallery"
    assert message("/gallery/photos?page=0", "http://elsewhere.example/gallery")[1] == "/gallery"
    assert message("/gallery/photos?page=0", f"{here}.example/gallery")[1] == "/gallery"


def test_a_filter_without_matches_has_a_link_back(gallery: Gallery) -> None:
    text = gallery.text("/gallery/photos?confidence=0-10")
    assert "No matching photos." in text
    assert gallery.total(next(address for address in links(text.partition("No matching photos")[2]))) == len(gallery.rows)


def test_a_page_number_beyond_the_last_shows_the_last_page(gallery: Gallery) -> None:
    answer = gallery.server.get("/gallery/photos?per_page=24&page=999")
    assert answer.status == 302
    assert parse_qs(urlsplit(answer.headers["Location"]).query)["page"] == [str(-(-len(gallery.rows) // 24))]


def test_pages_of_the_gallery_mark_it_as_current_in_the_navigation(gallery: Gallery) -> None:
    assert '<a href="/gallery" aria-current="page">Gallery</a>' in gallery.text("/gallery")
    assert '<a href="/gallery" aria-current="true">Gallery</a>' in gallery.text("/gallery/photos")


def test_without_a_folder_predictions_or_a_second_model_the_pages_explain_what_to_do(
    tiny_bundle: SimpleNamespace, tmp_path: Path
) -> None:
    with serve(tiny_bundle.path, database_url=f"sqlite:///{tmp_path / 'reviews.db'}") as server:
        text = poll(lambda: (page := server.get("/gallery/photos")).status == 200 and page.body.decode())
        assert "Start the service with <code>DATA_DIR</code> set to the evaluated folder." in text
        assert "Photo missing" in text
        assert "thumbnail.jpg" not in text
        text = server.get("/compare").body.decode()
        assert "Only one model is loaded." in text
        bundle = open_bundle(tiny_bundle.path)
        name, config = bundle.name, bundle.manifest["provenance"]["config"]
        given = (
            f"--epochs {config['epochs']} --batch-size {config['batch_size']} --optimizer sgd --lr {config['lr']} --momentum"
            f" 0.9 --weight-decay {config['weight_decay']} --lr-schedule {config['lr_schedule']} --seed {config['seed']}"
        )
        for command in (
            f"finetune train DATA --backbone tiny {given} --reviews reviews.csv --output-dir runs/{name}-reviewed",
            f"BUNDLE=runs/{name}-reviewed/bundle EVALUATIONS={tiny_bundle.path} DATA_DIR=DATA python -m service",
        ):
            assert f">{command}</code>" in text
        assert "<select" not in text


def test_a_head_only_bundle_is_listed_once_as_its_merged_bundle(tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    """With an evaluation of the head's version, which an older service stored as a separate model."""
    head, folds = open_bundle(tiny_bundle.head), tmp_path / "folds"
    folds.mkdir()
    generate(head.classes).write_csv(folds / PREDICTIONS)
    for name in SIMILARITY_FILES:
        shutil.copyfile(head.path / name, folds / name)
    write_evaluation(folds, head, kind=OUT_OF_FOLD, classes=head.classes, split="train and valid", temperature=1.0, folds=2)
    url = f"sqlite:///{tmp_path / 'reviews.db'}"
    database = Database(url)
    with database.write() as connection:
        get_or_create_model(connection, version=head.version, name=head.name, classes=head.classes)
    database.close()
    with serve(tiny_bundle.path, evaluations=f"{folds},{head.path}", database_url=url) as server:
        text = poll(lambda: (page := server.get("/gallery")).status == 200 and page.body.decode())
        models = re.findall(r'<bdi class="model-name">[^<]*</bdi> <code>([^<]*)</code>', text)
        assert models == [open_bundle(tiny_bundle.path).version]
        assert "Only one model is loaded." in server.get("/compare").body.decode()
        assert server.get("/gallery/photos.json?source=out-of-fold").json()["total"] == MORE
        assert f">{MORE} predictions</a> are out-of-fold (cross-validated)" in server.get("/gallery").body.decode()
        origin = f"merged from the head-only bundle <code>{head.version}</code> and its pretrained base"
        for path in ("/", "/model", "/gallery", server.get("/gallery/photos.json").json()["rows"][0]["page"]):
            page = server.get(path).body.decode()
            assert origin in page, path
            assert f'{models[0]}<span class="origin">, merged from {head.version}</span>' in page, path
        assert server.get("/models").json()["models"][0]["merged_from"] == head.version
        evaluated = read(tiny_bundle.predictions, "evaluation")
        assert server.get("/gallery/photos.json?source=evaluation").json()["total"] == len(evaluated)


@pytest.mark.parametrize(
    ("page", "pages", "expected"),
    [
        (1, 1, [1]),
        (1, 4, [1, 2, 3, 4]),
        (5, 9, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (1, 20, [1, 2, 3, None, 20]),
        (10, 20, [1, None, 8, 9, 10, 11, 12, None, 20]),
    ],
)
def test_the_pager_abbreviates_only_gaps_of_several_pages(page: int, pages: int, expected: list[int | None]) -> None:
    assert page_numbers(page, pages) == expected


# In a browser


@pytest.fixture
def new_page(browser: Browser, gallery: Gallery) -> Iterator[NewPage]:
    """The console may only report missing photos, and thumbnails and maps that are late because of their low priority."""
    gone = re.compile(f"{FAILED_REQUEST.pattern} (404|503|504)")
    with open_pages(browser, gallery.server.url, ignored=gone) as open_page:
        yield open_page


def test_arrow_keys_turn_pages_but_not_in_a_field(new_page: NewPage) -> None:
    page = new_page("/gallery/photos?per_page=24")
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**page=2")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url(lambda address: "page=" not in address.replace("per_page", ""))
    page.get_by_role("spinbutton", name="From").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_role("spinbutton", name="From").press("Enter")
    page.wait_for_url(lambda address: "from=" not in address)
    expect(page.locator(".pager [aria-current]")).to_have_text("Page 1")


@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_the_content_of_every_page_begins_at_the_same_position(new_page: NewPage, gallery: Gallery, width: int) -> None:
    """No page is wider than the window. A grid may be wider than text."""
    photo = gallery.server.get("/gallery/photos.json").json()["rows"][0]["page"]
    page = new_page("/", viewport={"width": width, "height": 900})
    found = []
    for path in ("/", "/gallery", "/gallery/photos", photo, "/compare", "/model", "/docs"):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") == width, path
        lefts = "names => names.map((name) => Math.round(document.querySelector(name).getBoundingClientRect().left))"
        found.append(page.evaluate(lefts, [".brand", "nav[aria-label=Pages]", "main > *", "h1"]))
    assert found == [found[0]] * len(found)
    assert found[0][0] == found[0][2] == found[0][3]


def test_a_selection_is_submitted_immediately_and_without_javascript_by_its_button(new_page: NewPage) -> None:
    page = new_page("/gallery/incorrect")
    expect(page.get_by_role("button", name="Show")).to_be_hidden()
    page.get_by_label("Sort").select_option("name.asc")
    page.wait_for_url("**sort=name*")
    expect(page.get_by_label("Sort")).to_have_value("name.asc")
    expect(page.get_by_label("Sort")).to_be_focused()
    expect(page.locator(".chip")).to_have_count(1)
    plain = new_page("/gallery/incorrect", java_script_enabled=False)
    plain.get_by_label("Sort").select_option("random.asc")
    plain.get_by_role("button", name="Show").click()
    plain.wait_for_url("**sort=random*")
    plain.get_by_role("link", name="Another random sample").click()
    plain.wait_for_url("**seed=1*")
    plain.locator(".chip").click()
    expect(plain.locator("h1")).to_contain_text("photos")


@pytest.mark.parametrize("device", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_filter_is_a_checkbox_that_keeps_its_position(new_page: NewPage, device: dict[str, Any]) -> None:
    page = new_page("/gallery/photos", **device)
    if page.locator("#filters > summary").is_visible():
        page.locator("#filters > summary").click()
    choice = page.get_by_role("checkbox", name=re.compile("^Incorrect"))
    choice.scroll_into_view_if_needed()
    before = choice.bounding_box()
    choice.focus()
    page.keyboard.press("Space")
    page.wait_for_url("**outcome=incorrect*")
    expect(choice).to_be_checked()
    expect(choice).to_be_focused()
    after = choice.bounding_box()
    assert before
    assert after
    assert after["y"] == pytest.approx(before["y"], abs=1.5)
    choice.click()
    expect(choice).not_to_be_checked()
    page.go_back()
    expect(choice).to_be_checked()


def test_a_missing_photo_has_a_placeholder(new_page: NewPage) -> None:
    page = new_page("/gallery/photos?source=out-of-fold&sort=name&per_page=24")
    tile = page.locator(".tile").first
    expect(tile.locator(".gone")).to_have_text("Photo missing")
    box = tile.locator(".frame").bounding_box()
    assert box
    assert box["width"] / box["height"] == pytest.approx(4 / 3, abs=0.02)
    expect(page.locator(".alert")).to_contain_text("Set DATA_DIR to the evaluated folder.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_every_listing_page_is_accessible_and_fits(new_page: NewPage, scheme: str, device: dict[str, Any]) -> None:
    page = new_page("/gallery", color_scheme=scheme, reduced_motion="reduce", **device)
    paths = ("/gallery", "/gallery/photos?outcome=incorrect&per_page=24", "/gallery/photos?confidence=0-10", "/compare")
    for number, path in enumerate(paths):
        page.goto(path)
        fold = page.locator("#filters > summary")
        if fold.is_visible():
            fold.click()
        check_accessibility(page, f"listing{number}-{device['viewport']['width']}-{scheme}")


# Thresholds


@pytest.mark.parametrize("percent", [0, 50, 60, 95])
def test_a_threshold_has_the_counts_of_the_tables(gallery: Gallery, percent: int) -> None:
    """Each count leads to exactly its photos."""
    for predicted in ("", *gallery.classes):
        text = gallery.text(f"/gallery/threshold?{urlencode({'percent': percent, 'predicted': predicted})}")
        figures = dict(re.findall(r"<dt>([^<]*)</dt><dd>(?:<a [^>]*>)?([^<]*)", text))
        abstaining, right, wrong = outcome_of(gallery.rows, percent, predicted)
        assert figures["No label"] == str(abstaining)
        assert figures["Mistakes left"] == str(wrong)
        assert figures["Precision of the others"] == (f"{right / (right + wrong):.2%}" if right + wrong else "\u2013")
        found = re.findall(r'<dd><a href="([^"]*)">', text)
        totals = [gallery.total(html.unescape(address)) for address in found]
        assert totals == [count for count in (abstaining, wrong) if count]


def test_a_threshold_lists_the_classes(gallery: Gallery) -> None:
    text = gallery.text("/gallery/threshold?percent=60")
    body = re.search(r'<table class="outcomes">.*?</table>', text, re.DOTALL)
    assert body
    rows = re.findall(r"<tr><th scope=\"row\">.*?<bdi>(\w+)</bdi>.*?</tr>", body[0], re.DOTALL)
    assert rows == list(gallery.classes)
    for name, row in zip(rows, re.findall(r"<tr><th.*?</tr>", body[0])[1:], strict=True):
        cells = [re.sub(r"<[^>]*>", " ", cell).split() for cell in re.findall(r"<td>(.*?)</td>", row)]
        abstaining, right, wrong = outcome_of(gallery.rows, 60, name)
        assert cells[0][0] == str(abstaining + right + wrong)
        assert cells[1][0] == str(abstaining)
        assert cells[3][0] == str(wrong)
        assert cells[4] == ["none"]


def test_the_form_of_a_threshold_works_without_javascript(gallery: Gallery) -> None:
    text = gallery.text("/gallery/threshold?percent=70")
    assert '<form class="threshold" action="/gallery/threshold">' in text
    assert re.search(r'<input type="number" id="percent" name="percent" min="0" max="99" step="1" value="70"', text)
    assert "<script>" not in text
    assert '/gallery/threshold"' in gallery.text("/gallery")


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("percent=100", "`percent` must be a whole number from 0 to 99 (got &#39;100&#39;)."),
        ("percent=half", "`percent` must be a whole number from 0 to 99 (got &#39;half&#39;)."),
        ("limit=3", "Unknown parameter"),
        ("predicted=cow", "Invalid `predicted`"),
    ],
)
def test_an_invalid_threshold_is_reported(gallery: Gallery, query: str, detail: str) -> None:
    answer = gallery.server.get(f"/gallery/threshold?{query}")
    assert answer.status == 400
    plain = answer.body.decode().replace("<code>", "`").replace("</code>", "`")
    assert detail in plain
