"""Retraining with reviews: decisions are matched by sha256, through the command line."""

from __future__ import annotations

import csv
import http.server
import itertools
import json
import re
import shutil
import sqlite3
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune import pipeline as run_module
from finetune.data.apply_reviews import ReviewTable, apply_reviews
from finetune.data.image_folder import read_dataset
from finetune.data.inspection import fingerprint_context, inspect_images
from finetune.data.review_source import hide_password
from finetune.io.array_store import ArrayStore
from models.artifacts.atomic_io import sha256_of
from models.artifacts.bundle import open_bundle
from models.artifacts.reviews import COLUMNS, Review, read_reviews, write_reviews
from models.errors import DataError
from tests.helpers.tiny_network import COLORS, color_folder, finetune, paint, save_weights

pytestmark = pytest.mark.slow


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return color_folder(tmp_path / "colours", train=6, valid=3)


def review(photo: Path, decision: str = "label", new_label: str = "", **more: str) -> Review:
    fields = {"label": photo.parent.name, "note": "", "reviewer": "Ada", "decided_at": "2024-05-01T10:00:00+00:00"} | more
    return Review(sha256_of(photo), photo.name, decision=decision, new_label=new_label, **fields)


def table(*reviews: Review, path: Path) -> Path:
    path.write_bytes(write_reviews(reviews))
    return path


def applied(data: Path, *reviews: Review) -> tuple[dict[str, str], str]:
    """Apply reviews; return {photo: class} of the remaining photos, and the summary text."""
    dataset = read_dataset(data)
    store = ArrayStore(data.parent / "cache", fingerprint_context(), limit_mb=10)
    records = inspect_images(dataset.samples, store=store, quiet=True)
    reviewed, remaining, summary = apply_reviews(
        ReviewTable.parse(write_reviews(reviews), origin="reviews.csv"), dataset, records
    )
    assert [s.sample for s in remaining] == list(reviewed.samples)
    return {p.name: reviewed.classes[p.label] for p in reviewed.samples}, summary.text()


# The table


def test_a_table_round_trips_also_through_a_spreadsheet() -> None:
    reviews = (
        Review(
            "a" * 64, "train/cats/1, or so.jpg", "cats", "label", "dogs", 'a "dog"\nclearly\ror\r\nnot', "Ada", "2024-05-01"
        ),
        Review("b" * 64, "train/cats/猫.jpg", "cats", "bad", "", "", "", ""),
    )
    data = write_reviews(reviews)
    assert data.decode().splitlines()[0] == "sha256,photo,label,decision,new_label,note,reviewer,decided_at"
    assert read_reviews(data, origin="r.csv") == reviews
    assert read_reviews(b"\xef\xbb\xbf" + data, origin="r.csv") == reviews
    assert read_reviews(write_reviews([]), origin="r.csv") == ()


SHA = "A" * 64
HEADER = "sha256;photo;label;decision;new_label;note;reviewer;decided_at"
ROW = f"{SHA};1.jpg;cats;label;dogs;note, with a comma;me;2026-01-01"


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}\n{ROW}\n",
        f"sep=;\r\n{HEADER}\r\n{ROW}\r\n",
        f"\n\n{HEADER}\n\n{ROW}\n;;;;;;;\n  \n",
        f"{HEADER.upper()};extra\n{ROW};\n",
        f"{HEADER}\n{ROW};;\n",
        HEADER.replace(";", " ; ") + f"\n{ROW}",
        f"{HEADER}\n{ROW}\n".replace(";", "\t"),
        f"{HEADER}\n{ROW}\n".replace("note, with a comma", '"note, with a comma"').replace(";", ","),
    ],
    ids=["semicolon", "sep line", "blank lines", "extra column", "extra cells", "spaces", "tab", "comma"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_spreadsheets_are_read(text: str, encoding: str) -> None:
    assert read_reviews(text.encode(encoding), origin="r.csv") == (
        Review("a" * 64, "1.jpg", "cats", "label", "dogs", "note, with a comma", "me", "2026-01-01"),
    )


def test_the_line_of_a_malformed_row_is_reported_after_blank_lines_and_long_notes() -> None:
    good = ROW.replace("note, with a comma", '"two\nlines"')
    with pytest.raises(DataError, match=r"^r\.csv, line 7: expected 8 columns as in the header, got 3\."):
        read_reviews(f"sep=;\n{HEADER}\n\n{good}\n\na;b;c\n".encode(), origin="r.csv")


def test_the_unicode_form_of_a_class_in_a_table_does_not_matter() -> None:
    nfc, nfd = (unicodedata.normalize(form, "bébé") for form in ("NFC", "NFD"))
    (row,) = read_reviews(f"{HEADER}\n{ROW.replace('dogs', nfd)}".encode(), origin="r.csv")
    assert row.new_label == nfc


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decision": "maybe"}, r"line 2 .*: unknown decision 'maybe'\. Use label, neither, bad"),
        ({"decision": "label"}, "the decision 'label' requires new_label"),
        ({"sha256": "abc"}, "'abc' is not a sha256"),
    ],
)
def test_a_malformed_row_is_reported(changes: dict[str, str], message: str) -> None:
    row = replace(Review("a" * 64, "1.jpg", "cats", "bad", "", "", "", ""), **changes)
    with pytest.raises(DataError, match=message):
        read_reviews(write_reviews([row]), origin="r.csv")


def test_contradictory_decisions_are_rejected() -> None:
    row = Review("a" * 64, "1.jpg", "cats", "bad", "", "", "", "")
    with pytest.raises(DataError, match=r"line 3 \(2\.jpg\): contradicts another row of the same photo"):
        read_reviews(write_reviews([row, replace(row, photo="2.jpg", decision="neither")]), origin="r.csv")
    assert len(read_reviews(write_reviews([row, replace(row, photo="2.jpg")]), origin="r.csv")) == 2


# What decisions do


def test_decisions_relabel_confirm_and_exclude_by_sha256(data: Path) -> None:
    blue, red = data / "train" / "blue", data / "train" / "red"
    decisions = (
        review(blue / "blue.000.jpg", new_label="red"),
        review(blue / "blue.001.jpg", new_label="blue"),
        review(red / "red.000.jpg", "neither"),
        review(data / "valid" / "red" / "red.001.jpg", "bad"),
        replace(review(blue / "blue.002.jpg", "bad"), sha256="0" * 64),  # the name alone does not match
    )
    (blue / "blue.000.jpg").rename(blue / "renamed.jpg")
    labels, message = applied(data, *decisions)
    assert labels["train/blue/renamed.jpg"] == "red"
    assert labels["train/blue/blue.001.jpg"] == labels["train/blue/blue.002.jpg"] == "blue"
    assert not {"train/red/red.000.jpg", "valid/red/red.001.jpg"} & labels.keys()
    assert len(labels) == 16
    assert "reviews.csv: 5 reviews (1 relabeled, 1 confirmed, 2 excluded, 1 unmatched)" in message
    assert "  train/blue/renamed.jpg: blue -> red" in message
    assert "  train/red/red.000.jpg: excluded (none of the classes)" in message
    assert "  valid/red/red.001.jpg: excluded (bad photo)" in message


def test_a_decision_resolves_duplicates_with_different_labels(data: Path) -> None:
    """Within a split every copy gets the label. Across splits only the copy whose folder was correct remains."""
    first, second = (data / "train" / "blue" / f"blue.00{i}.jpg" for i in (0, 1))
    shutil.copyfile(first, data / "train" / "red" / "same.jpg")
    shutil.copyfile(second, data / "valid" / "red" / "same.jpg")
    labels, message = applied(data, review(first, new_label="red"), review(second, new_label="red"))
    assert labels["train/blue/blue.000.jpg"] == labels["train/red/same.jpg"] == labels["valid/red/same.jpg"] == "red"
    assert "train/blue/blue.001.jpg" not in labels
    assert "blue.001.jpg: excluded (reviewed as red, and the other split has the same photo)" in message


def test_a_contradicting_near_duplicate_is_excluded(data: Path) -> None:
    from PIL import Image

    first = data / "train" / "blue" / "blue.000.jpg"
    with Image.open(first) as picture:
        picture.save(data / "train" / "red" / "again.png")
    untouched, _ = applied(data)
    assert "train/red/again.png" in untouched
    labels, message = applied(data, review(first, new_label="blue"))
    assert labels["train/blue/blue.000.jpg"] == "blue"
    assert "train/red/again.png" not in labels
    assert "again.png: excluded (near duplicate of a photo reviewed as blue)" in message


# Through the command line


@pytest.fixture
def train(data: Path, tmp_path: Path, tiny_weights: Path) -> Callable[..., tuple[int, str, str]]:
    def run(*flags: object, out: str = "run") -> tuple[int, str, str]:
        fine = ("--data-dir", data, "--backbone", "tiny", "--weights", tiny_weights, "--output-dir", tmp_path / out)
        return finetune("train", *fine, *flags)

    return run


def predictions_of(run: Path) -> dict[str, str]:
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return {row["photo"]: row["label"] for row in csv.DictReader(file)}


def test_training_with_reviews_reports_and_saves_the_changes(
    data: Path, tmp_path: Path, train: Callable[..., tuple[int, str, str]]
) -> None:
    """Includes a photo in two classes and both splits, which without a decision is rejected as leakage."""
    shutil.copyfile(data / "train" / "blue" / "blue.005.jpg", data / "valid" / "red" / "same.jpg")
    code, _, err = train()
    assert (code, "in both training and validation" in err) == (2, True)
    file = table(
        review(data / "train" / "blue" / "blue.000.jpg", new_label="red", note="secret note"),
        review(data / "valid" / "blue" / "blue.000.jpg", new_label="red"),
        review(data / "valid" / "blue" / "blue.001.jpg", "bad"),
        review(data / "train" / "blue" / "blue.005.jpg", new_label="blue"),
        path=tmp_path / "reviews.csv",
    )
    code, out, err = train("--reviews", file)
    assert (code, err) == (0, "")
    assert "train/blue/blue.000.jpg: blue -> red" in out
    assert "The reviews corrected labels in both training and validation." in out
    run = tmp_path / "run"
    assert predictions_of(run) == {
        "valid/blue/blue.000.jpg": "red",
        "valid/blue/blue.002.jpg": "blue",
        **{f"valid/red/red.00{i}.jpg": "red" for i in range(3)},
    }
    assert (run / "reviews.csv").read_bytes() == file.read_bytes()
    dataset = open_bundle(run / "bundle").manifest["provenance"]["dataset"]
    assert dataset["reviews"] == {
        "sha256": sha256_of(file),
        "decisions": 4,
        "relabeled": 2,
        "confirmed": 1,
        "neither": 0,
        "bad": 1,
        "other_copies": 1,
        "unmatched": 0,
    }
    assert dataset["photos"]["train"] == {"blue": 5, "red": 7}
    card = (run / "bundle" / "README.md").read_text(encoding="utf-8")
    assert "In a review, 2 labels were changed, 1 confirmed and 2 photos excluded" in card
    for kept in run.joinpath("bundle").rglob("*"):
        if kept.is_file():
            assert b"secret note" not in kept.read_bytes()
            assert b"Ada" not in kept.read_bytes()


def test_resuming_with_other_reviews_is_rejected(
    data: Path, tmp_path: Path, train: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(*args: object, **more: object) -> None:
        raise Stop

    photo = data / "train" / "blue" / "blue.000.jpg"
    file = table(review(photo, new_label="red"), path=tmp_path / "reviews.csv")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_outputs", stop)
        with pytest.raises(Stop):
            train("--reviews", file)
    table(review(photo, new_label="red", note="on second thoughts"), path=file)
    resume = ("train", "--resume", "--output-dir", tmp_path / "run")
    code, _, err = finetune(*resume)
    assert (code, "was started with other photos or weights. Start another run." in err) == (2, True)
    table(review(photo, new_label="red"), path=file)
    assert finetune(*resume)[0] == 0


def test_errors_in_the_reviews_are_one_line(data: Path, tmp_path: Path, train: Callable[..., tuple[int, str, str]]) -> None:
    def error_of(*flags: object) -> str:
        code, _, err = train(*flags)
        assert code == 2
        assert re.fullmatch(r"finetune: [^\n]{20,600}\n", err), err
        assert not (tmp_path / "run").exists()
        return err

    photo = data / "train" / "blue" / "blue.000.jpg"
    file = table(review(photo, new_label="rde"), path=tmp_path / "reviews.csv")
    assert "unknown class 'rde' for blue.000.jpg. The classes are blue, red. Did you mean 'red'?" in error_of("--reviews", file)
    file.write_text("photo,label\n")
    assert "has no column 'sha256'" in error_of("--reviews", file)
    assert "Cannot read the reviews" in error_of("--reviews", tmp_path / "no.csv")
    assert "--reviews and --reviews-from cannot be combined" in error_of("--reviews", file, "--reviews-from", "sqlite:///x")
    assert "(sqlite:///FILE, postgresql://...), got 'reviews.csv'" in error_of("--reviews-from", "reviews.csv")
    assert "No such database" in error_of("--reviews-from", f"sqlite:///{tmp_path}/no.db")
    assert not (tmp_path / "no.db").exists()
    sqlite3.connect(tmp_path / "empty.db").close()
    assert "no such table: current_reviews" in error_of("--reviews-from", f"sqlite:///{tmp_path}/empty.db")
    assert "Cannot reach http://127.0.0.1:9/reviews.csv" in error_of("--reviews-from", "http://127.0.0.1:9/reviews.csv")
    err = error_of("--reviews-from", "postgresql://ada:opensesame@127.0.0.1:9/gallery")
    assert "postgresql://ada:***@127.0.0.1:9/gallery" in err
    assert "opensesame" not in err


def test_reviews_are_read_from_a_database(data: Path, tmp_path: Path, train: Callable[..., tuple[int, str, str]]) -> None:
    folder = data / "train"
    rows = [review(folder / "blue" / "blue.000.jpg", new_label="red"), review(folder / "red" / "red.000.jpg", "bad")]
    with closing(sqlite3.connect(tmp_path / "gallery.db")) as database, database:
        database.execute(f"CREATE TABLE kept ({', '.join(COLUMNS)})")
        database.execute(f"CREATE VIEW current_reviews AS SELECT {', '.join(COLUMNS)} FROM kept")
        values = [[getattr(row, name) or None for name in COLUMNS] for row in rows]
        database.executemany(f"INSERT INTO kept VALUES ({','.join('?' * len(COLUMNS))})", values)
    code, out, err = train("--reviews-from", f"sqlite:///{tmp_path}/gallery.db")
    assert (code, err) == (0, "")
    assert "2 reviews (1 relabeled, 0 confirmed, 1 excluded, 0 unmatched)" in out
    assert read_reviews((tmp_path / "run" / "reviews.csv").read_bytes(), origin="run") == tuple(rows)


class Gallery(http.server.BaseHTTPRequestHandler):
    """Serves reviews.csv to requests with the API key, and redirects from another path."""

    table = b""

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/reviews.csv")
            self.end_headers()
            return
        known = self.headers.get("X-API-Key") == "opensesame"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(self.table if known else b"")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def gallery() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gallery) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_reviews_are_fetched_from_a_gallery_with_its_key(
    data: Path, tmp_path: Path, gallery: str, train: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gallery, "table", write_reviews([review(data / "train" / "blue" / "blue.000.jpg", new_label="red")]))
    code, _, err = train("--reviews-from", f"{gallery}/reviews.csv")
    assert (code, "returned 401 Unauthorized. Set REVIEWS_KEY to the gallery's API key." in err) == (2, True)
    monkeypatch.setenv("REVIEWS_KEY", "opensesame")
    code, _, err = train("--reviews-from", f"{gallery}/moved")
    assert (code, "returned 302" in err) == (2, True)
    code, out, err = train("--reviews-from", f"{gallery.replace('//', '//ada:word@')}/reviews.csv?x=1")
    assert code == 2  # urllib does not support passwords in URLs
    assert "word" not in err
    code, out, err = train("--reviews-from", f"{gallery}/reviews.csv?x=1")
    assert (code, err) == (0, "")
    assert "train/blue/blue.000.jpg: blue -> red" in out
    run = tmp_path / "run"
    assert (run / "reviews.csv").read_bytes() == Gallery.table
    assert "x=1" not in (run / "config.yaml").read_text()
    monkeypatch.delenv("REVIEWS_KEY")
    (run / "checkpoint.pt").unlink()
    shutil.rmtree(run / "bundle")
    code, out, _ = finetune("train", "--resume", "--output-dir", run)  # uses the saved reviews
    assert code == 0
    assert "train/blue/blue.000.jpg: blue -> red" in out


def test_a_password_is_never_shown() -> None:
    assert hide_password("postgresql://ada:a@b:c@db:5432/gallery?sslmode=require") == "postgresql://ada:***@db:5432/gallery"
    assert hide_password("sqlite:////data/gallery.db") == "sqlite:////data/gallery.db"
    assert hide_password("https://host:8080/reviews.csv?key=1") == "https://host:8080/reviews.csv"


# Further folders, such as what was photographed live


def test_a_folder_with_only_training_photos_can_be_used(tmp_path: Path, tiny_weights: Path) -> None:
    data = color_folder(tmp_path / "live", train=6, valid=0)
    flags = ("--backbone", "tiny", "--weights", tiny_weights, "--output-dir", tmp_path / "run")
    code, out, err = finetune("train", "--data-dir", data, *flags)
    assert (code, err) == (0, "")
    assert "valid (held out from training): blue 1, red 1" in out


def test_extra_photos_are_added_to_training(data: Path, tmp_path: Path, train: Callable[..., tuple[int, str, str]]) -> None:
    live = color_folder(tmp_path / "live", train=4, valid=2, classes=("blue", "red", "green"))
    shutil.rmtree(live / "train" / "green")
    for i in range(4):  # others than data has
        paint(live / "train" / "red" / f"red.00{i}.jpg", COLORS[1], seed=500 + i)
    more = tmp_path / "more"
    shutil.copytree(color_folder(tmp_path / "x", train=8, valid=0) / "train" / "red", more / "red")
    for i in range(6):
        (more / "red" / f"red.00{i}.jpg").unlink()  # already in the data folder
    shutil.copyfile(live / "train" / "red" / "red.000.jpg", more / "red" / "again.jpg")
    shutil.rmtree(live / "train" / "blue")
    code, out, err = train("--extra-data", live, "--extra-data", more)
    assert (code, err) == (0, "")
    assert f"Extra data: {live} (as extra-1/)" in out
    bundle = open_bundle(tmp_path / "run" / "bundle")
    dataset = bundle.manifest["provenance"]["dataset"]
    assert dataset["photos"] == {"train": {"blue": 6, "red": 6 + 4 + 3}, "valid": {"blue": 3, "red": 3}}
    assert (dataset["extra_folders"], dataset["excluded"]) == (2, 0)
    assert str(tmp_path) not in json.dumps(dict(bundle.manifest))
    with (tmp_path / "run" / "duplicates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["photo"] for row in rows} == {"extra-1/train/red/red.000.jpg", "extra-2/red/again.jpg"}


def test_extra_photos_already_in_the_data_folder_are_skipped(
    data: Path, tmp_path: Path, train: Callable[..., tuple[int, str, str]]
) -> None:
    """Exact duplicates of any photo, and near duplicates of validation photos."""
    from PIL import Image

    live = tmp_path / "live" / "train"
    for split, label, given in (("valid", "red", "red"), ("train", "blue", "blue"), ("valid", "blue", "red")):
        (live / given).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / split / label / f"{label}.000.jpg", live / given / f"{split}-{label}.jpg")
    with Image.open(data / "valid" / "red" / "red.001.jpg") as picture:
        picture.save(live / "red" / "alike.png")
    paint(live / "red" / "new.jpg", COLORS[1], seed=500)
    code, out, err = train("--extra-data", tmp_path / "live")
    assert (code, err) == (0, "")
    assert (
        "- skipped 4 photos from --extra-data (already in the data folder, 1 with another label; "
        "use --reviews to change labels)\n"
    ) in out
    assert "  extra-1/train/red/valid-blue.jpg = valid/blue/blue.000.jpg (labeled blue)\n" in out
    found = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert found["dropped_extra"] == {
        "extra-1/train/blue/train-blue.jpg": {"name": "train/blue/blue.000.jpg", "label": None},
        "extra-1/train/red/alike.png": {"name": "valid/red/red.001.jpg", "label": None},
        "extra-1/train/red/valid-blue.jpg": {"name": "valid/blue/blue.000.jpg", "label": "blue"},
        "extra-1/train/red/valid-red.jpg": {"name": "valid/red/red.000.jpg", "label": None},
    }
    dataset = open_bundle(tmp_path / "run" / "bundle").manifest["provenance"]["dataset"]
    assert dataset["photos"] == {"train": {"blue": 6, "red": 7}, "valid": {"blue": 3, "red": 3}}
    assert dataset["excluded"] == 4
    # A review changes the label of the data folder's own.
    file = table(review(data / "valid" / "blue" / "blue.000.jpg", new_label="red"), path=tmp_path / "reviews.csv")
    code, out, err = train("--extra-data", tmp_path / "live", "--reviews", file, out="again")
    assert (code, err) == (0, "")
    assert predictions_of(tmp_path / "again")["valid/blue/blue.000.jpg"] == "red"


def test_an_extra_folder_that_does_not_fit_is_rejected(tmp_path: Path, train: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "none" / "train" / "blue").mkdir(parents=True)
    (tmp_path / "other" / "green").mkdir(parents=True)
    for folder, message in (
        ("nowhere", "No such folder"),
        ("none", "has no photos of blue, red. Remove it from --extra-data."),
        ("other", "has the class 'green', but the data folder has blue, red"),
    ):
        code, _, err = train("--extra-data", tmp_path / folder)
        assert (code, message in err) == (2, True), err


# Out-of-fold predictions


def test_out_of_fold_predictions_with_reviews(
    data: Path, tmp_path: Path, train: Callable[..., tuple[int, str, str]], tiny_weights: Path
) -> None:
    from models.artifacts.evaluation import open_predictions

    mislabeled = data / "train" / "red" / "blue.jpg"
    (data / "train" / "blue" / "blue.003.jpg").rename(mislabeled)
    shutil.copyfile(data / "train" / "blue" / "blue.001.jpg", data / "train" / "blue" / "again.jpg")
    assert train("--epochs", 12)[0] == 0
    bundle, out = tmp_path / "run" / "bundle", tmp_path / "folds"
    flags = ("--bundle", bundle, "--data-dir", data, "--weights", tiny_weights, "--folds", 3)
    code, message, err = finetune("evaluate", *flags, "--output-dir", out)
    assert (code, err) == (0, "")
    assert "train/red/blue.jpg: red, looks like blue" in message
    results = open_predictions(out)
    assert (results.kind, results.folds, results.split) == ("out-of-fold", 3, "train and valid")
    predictions, similarity = results.predictions(), results.similarity()
    names = {path.relative_to(data).as_posix() for path in data.rglob("*.jpg")}
    assert set(predictions.image_names) == names
    assert all(name.startswith(f"{split}/") for name, split in zip(predictions.image_names, predictions.splits, strict=True))
    assert similarity.sha256s == predictions.sha256s
    assert len(similarity.duplicates_of("train/blue/again.jpg")) == 2
    row = predictions.image_names.index("train/red/blue.jpg")
    assert predictions.classes[predictions.predicted[row]] == "blue"
    assert {predictions.image_names[other].split("/")[1] for other, _ in similarity.nearest(row, 3)} == {"blue"}
    assert (out / "metrics.json").is_file()
    assert results.bundle_version == open_bundle(bundle).version

    file = table(review(mislabeled, new_label="blue"), path=tmp_path / "reviews.csv")
    assert finetune("evaluate", *flags, "--output-dir", tmp_path / "again", "--reviews", file)[0] == 0
    corrected = open_predictions(tmp_path / "again").predictions()
    assert corrected.classes[corrected.labels[corrected.image_names.index("train/red/blue.jpg")]] == "blue"


def test_a_model_at_chance_lists_no_label_errors(tmp_path: Path, tiny_bundle: SimpleNamespace, tiny_weights: Path) -> None:
    """In this folder every class has the same colors, so that the photos do not tell their class."""
    from models.artifacts.evaluation import open_predictions
    from models.artifacts.label_issues import find_label_issues

    classes = open_bundle(tiny_bundle.path).classes
    for index, (name, color, _) in enumerate(itertools.product(classes, COLORS[:3], range(4))):
        paint(tmp_path / "data" / "train" / name / f"{index:03d}.jpg", color, seed=500 + index)
    flags = ("--bundle", tiny_bundle.path, "--data-dir", tmp_path / "data", "--weights", tiny_weights, "--folds", 2)
    code, message, err = finetune("evaluate", *flags, "--output-dir", tmp_path / "folds")
    assert (code, err) == (0, "")
    assert "Possible label errors: unknown. The accuracy is not significantly better than chance." in message
    assert "looks like" not in message
    assert not find_label_issues(open_predictions(tmp_path / "folds").predictions()).any()


def test_duplicates_are_in_the_same_fold(data: Path, tmp_path: Path) -> None:
    import numpy as np

    from finetune.evaluation.cross_validation import assign_folds

    for i in range(4):
        shutil.copyfile(data / "train" / "blue" / f"blue.00{i}.jpg", data / "valid" / "red" / f"same{i}.jpg")
    dataset = read_dataset(data)
    records = inspect_images(
        dataset.samples, store=ArrayStore(tmp_path / "cache", fingerprint_context(), limit_mb=10), quiet=True
    )
    labels = np.array([photo.label for photo in dataset.samples])
    fold_of = assign_folds(records, labels, folds=3, classes=dataset.classes, seed=0)
    by_sha: dict[str, set[int]] = {}
    for s, fold in zip(records, fold_of, strict=True):
        by_sha.setdefault(s.sha256, set()).add(int(fold))
    assert all(len(folds) == 1 for folds in by_sha.values())
    for fold in range(3):
        assert set(labels[fold_of == fold]) == {0, 1}
    with pytest.raises(DataError, match="--folds is 10, but the class blue has only 9 photos"):
        assign_folds(records, labels, folds=10, classes=dataset.classes, seed=0)


def test_impossible_folds_are_rejected(
    data: Path, tmp_path: Path, train: Callable[..., tuple[int, str, str]], tiny_weights: Path
) -> None:
    assert train("--epochs", 1)[0] == 0
    assert train("--epochs", 1, "--unfreeze", "classifier.3", out="deep")[0] == 0
    other = save_weights(tmp_path / "other.pth", seed=1)

    def error_of(*flags: object, run: str = "run") -> str:
        fine = ("--bundle", tmp_path / run / "bundle", "--data-dir", data, "--output-dir", tmp_path / "out")
        code, _, err = finetune("evaluate", *fine, *flags)
        assert code == 2
        assert not (tmp_path / "out").exists()
        return err

    base = ("--weights", tiny_weights)
    assert "--folds must be at least 2" in error_of("--folds", 1, *base)
    assert "cannot be combined with --split" in error_of("--folds", 3, "--split", "train", *base)
    assert "the class blue has only 9 photos" in error_of("--folds", 10, *base)
    assert "was trained on other base weights" in error_of("--folds", 3, "--weights", other)
    assert "--weights requires --folds. Set the number of folds, or remove it." in error_of(*base)
    assert "does not have because it was trained with --unfreeze" in error_of("--folds", 3, *base, run="deep")
