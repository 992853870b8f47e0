from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from finetune.__main__ import main
from finetune.config import Config
from finetune.data import duplicates
from finetune.data.duplicates import find_duplicates
from finetune.data.image_folder import Sample
from finetune.data.inspection import ImageRecord, fingerprint
from finetune.training.trainer import Progress
from models.errors import DataError
from tests.conftest import PhotoFolder
from tests.helpers.tiny_network import COLORS, color_folder, paint

Findings = dict[str, Any]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return color_folder(tmp_path / "data", train=4, valid=2)


def audit_json(data: Path, capsys: pytest.CaptureFixture[str], *, code: int) -> Findings:
    assert main(["audit", str(data), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def audit_text(data: Path, capsys: pytest.CaptureFixture[str], *, code: int) -> str:
    assert main(["audit", str(data)]) == code
    return capsys.readouterr().out


def test_a_clean_folder_has_no_findings(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = audit_json(data, capsys, code=0)
    assert found["counts"] == {"train": {"blue": 4, "red": 4}, "valid": {"blue": 2, "red": 2}}
    assert found["imbalance"] == 1.0
    assert not any(found[key] for key in ("damaged", "leakage", "conflicts", "duplicates", "skipped", "unlabeled"))
    text = audit_text(data, capsys, code=0)
    assert "12 photos" in text
    assert "No problems found." in text


def test_different_drawings_are_not_duplicates(
    tmp_path: Path, photo_folder: PhotoFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    found = audit_json(photo_folder(tmp_path, train=25, valid=10), capsys, code=0)
    assert (found["leakage"], found["conflicts"], found["duplicates"]) == ([], [], [])


def _truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _truncate_before_end_marker(path: Path) -> None:
    _truncate(path)
    path.write_bytes(path.read_bytes() + b"\xff\xd9")


DAMAGE = {
    "cut.jpg": lambda path: _truncate(paint(path, COLORS[0], seed=50)),
    "ended.jpg": lambda path: _truncate_before_end_marker(paint(path, COLORS[0], seed=51)),
    "page.jpg": lambda path: path.write_text("<html>not found</html>"),
    "empty.png": lambda path: path.write_bytes(b""),
    "movie.jpeg": lambda path: path.write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(500)),
}


def test_damaged_files_are_listed_with_the_reason(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, make in DAMAGE.items():
        make(data / "train" / "red" / name)
    found = audit_json(data, capsys, code=1)
    assert set(found["damaged"]) == {f"train/red/{name}" for name in DAMAGE}
    assert "damaged" in found["damaged"]["train/red/cut.jpg"]
    assert found["damaged"]["train/red/page.jpg"].startswith("This file is not a supported image. Use JPEG")
    assert found["damaged"]["train/red/empty.png"] == "The file is empty."
    assert found["damaged"]["train/red/movie.jpeg"].startswith("Video is not supported. Use JPEG")
    assert found["counts"]["train"] == {"blue": 4, "red": 4}
    text = audit_text(data, capsys, code=1)
    assert "- 5 damaged files (skipped)" in text
    assert "train/red/cut.jpg: The image is damaged" in text


def test_other_files_and_hidden_folders_are_listed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stray in ("train/.ipynb_checkpoints", "__MACOSX", "train/red/.ipynb_checkpoints"):
        (data / stray).mkdir()
        paint(data / stray / "copy.jpg", COLORS[0], seed=70)
    text = audit_text(data, capsys, code=0)
    assert "Note: 3 skipped (hidden): __MACOSX, train/.ipynb_checkpoints, train/red/.ipynb_checkpoints" in text
    (data / "valid" / "blue" / "notes.txt").write_text("x")
    (data / "train" / "blue" / "cat.svg").write_bytes(b"x")
    found = audit_json(data, capsys, code=1)
    assert found["skipped"] == {
        "__MACOSX": "hidden",
        "train/.ipynb_checkpoints": "hidden",
        "train/red/.ipynb_checkpoints": "hidden",
        "train/blue/cat.svg": "not a supported image type",
        "valid/blue/notes.txt": "not a supported image type",
    }
    assert found["counts"]["train"] == {"blue": 4, "red": 4}
    text = audit_text(data, capsys, code=1)
    assert "- 2 skipped (not a supported image type): train/blue/cat.svg, valid/blue/notes.txt" in text


def test_the_folder_of_a_split_is_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "valid").rename(data / "Dev_Set")
    assert "  valid (Dev_Set): blue 2, red 2\n" in audit_text(data, capsys, code=0)


def test_a_test_split_is_not_used_for_training(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(data / "test" / "red" / "a.jpg", COLORS[0], seed=70)
    assert "Note: test is not used for training. Evaluate it with `finetune evaluate --split test`." in audit_text(
        data, capsys, code=0
    )


def test_the_note_about_a_test_split_fits_its_content(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(data / "Test Set" / "1.jpg", COLORS[0], seed=900)
    assert (
        "Note: Test Set is not used because it has no class folders. Classify its photos with `finetune predict`."
        in audit_text(data, capsys, code=0)
    )
    paint(data / "Test Set" / "red" / "1.jpg", COLORS[1], seed=901)
    assert "Evaluate it with `finetune evaluate --split 'Test Set'`." in audit_text(data, capsys, code=0)


def test_a_validation_folder_of_links_to_the_training_folder_is_explained(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(data / "valid")
    (data / "valid").symlink_to("train")
    text = audit_text(data, capsys, code=1)
    assert "- valid only links to folders that are included already" in text
    assert "Training on this folder fails:" in text


def test_classes_of_other_names_in_validation_are_the_reason_why_training_fails(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "valid" / "red").rename(data / "valid" / "Red")
    (data / "valid" / "blue").rename(data / "valid" / "green")
    message = "classes differ between the splits (only in training: blue, red; only in validation: Red, green)"
    text = audit_text(data, capsys, code=1)
    assert f"- {message}\n" in text
    assert f"Training on this folder fails: {data}: {message}. Use the same classes in every split, or pass" in text


def _copy(source: Path, target: Path) -> None:
    shutil.copy(source, target)


def _encode_again(source: Path, target: Path) -> None:
    Image.open(source).save(target, quality=70)


def _shrink(source: Path, target: Path) -> None:
    photo = Image.open(source)
    photo.resize((photo.width * 2 // 3, photo.height * 2 // 3), Image.Resampling.LANCZOS).save(target, quality=85)


def _as_png(source: Path, target: Path) -> None:
    Image.open(source).save(target.with_suffix(".png"))


SIMILARITY_FILES = [_copy, _encode_again, _shrink, _as_png]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, photo_folder: PhotoFolder) -> Path:
    return photo_folder(tmp_path_factory.mktemp("drawn"), train=6, valid=3)


@pytest.mark.parametrize("make", SIMILARITY_FILES)
@pytest.mark.parametrize(
    ("target", "kinds"),
    [
        ("valid/cats/z.jpg", {"leakage"}),
        ("train/dogs/z.jpg", {"conflicts"}),
        ("valid/dogs/z.jpg", {"leakage", "conflicts"}),
        ("train/cats/z.jpg", {"duplicates"}),
    ],
)
def test_duplicates_are_found_in_any_split_and_class(
    tmp_path: Path, drawn: Path, capsys: pytest.CaptureFixture[str], make: Any, target: str, kinds: set[str]
) -> None:
    data = Path(shutil.copytree(drawn, tmp_path / "data"))
    make(data / "train/cats/cats.0001.jpg", data / target)
    found = audit_json(data, capsys, code=0 if kinds == {"duplicates"} else 1)
    (copy,) = sorted((data / target).parent.glob("z.*"))
    pair = sorted(["train/cats/cats.0001.jpg", copy.relative_to(data).as_posix()])
    assert {kind: found[kind] for kind in ("leakage", "conflicts", "duplicates") if found[kind]} == {
        kind: [pair] for kind in kinds
    }
    assert " = ".join(pair) in audit_text(data, capsys, code=0 if kinds == {"duplicates"} else 1)


def test_three_copies_are_one_group(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = data / "train/red/red.001.jpg"
    for name in ("valid/red/a.jpg", "valid/blue/b.jpg"):
        shutil.copy(source, data / name)
    found = audit_json(data, capsys, code=1)
    assert found["leakage"] == [["train/red/red.001.jpg", "valid/blue/b.jpg", "valid/red/a.jpg"]]


def test_plain_images_of_different_colors_are_not_duplicates(tmp_path: Path) -> None:
    records = []
    for i, color in enumerate(COLORS):
        picture = Image.new("RGB", (64, 48), color)
        records.append(ImageRecord(Sample(f"{i}.png", tmp_path, 0, "train"), f"{i:064x}", fingerprint(picture), None))
    assert find_duplicates(records) == []


@pytest.mark.parametrize(
    ("flips", "levels", "near"),
    [
        ({}, 0, True),
        ({0: 1, 3: 2, 7: 128}, 0, True),
        ({6: 0b0111}, 10, True),
        ({6: 0b1111}, 0, False),
        ({}, 11, False),
    ],
)
def test_thresholds_of_near_duplicates(tmp_path: Path, flips: dict[int, int], levels: int, near: bool) -> None:
    """At most three bits of the hash, wherever they are, and ten levels of the thumbnail."""
    first = np.full(776, 100, np.uint8)
    second = first.copy()
    for byte, mask in flips.items():
        second[byte] ^= mask
    second[8:] += levels
    records = [
        ImageRecord(Sample(f"{i}.jpg", tmp_path, 0, "train"), f"{i:064x}", row, None) for i, row in enumerate((first, second))
    ]
    assert bool(find_duplicates(records)) == near


def test_a_large_bucket_still_finds_exact_hash_matches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Many plain images share a hash quarter. Then not every pair is compared, but equal hashes always are."""
    monkeypatch.setattr(duplicates, "MAX_BUCKET_SIZE", 3)
    rng = np.random.default_rng(0)
    prints = [rng.integers(0, 256, 776).astype(np.uint8) for _ in range(10)]
    for row in prints:
        row[:2] = 7
    prints += [prints[4], prints[8]]
    records = [ImageRecord(Sample(f"{i:02}", tmp_path, 0, "train"), f"{i:064x}", row, None) for i, row in enumerate(prints)]
    assert [[s.sample.name for s in group] for group in find_duplicates(records)] == [["04", "10"], ["08", "11"]]


def test_empty_classes_and_classes_in_only_one_split(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train/amber", "valid/amber", "train/green", "valid/grey"):
        (data / name).mkdir()
    paint(data / "train/green/1.jpg", COLORS[2], seed=80)
    found = audit_json(data, capsys, code=1)
    assert found["class_mismatch"] == {"training": ["green"], "validation": ["grey"]}
    assert set(found["empty_classes"]) >= {"train/amber", "valid/amber"}
    text = audit_text(data, capsys, code=1)
    assert "(only in training: green; only in validation: grey)" in text
    assert "train/amber" in text


def test_a_large_imbalance_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = color_folder(tmp_path, train=2, valid=2)
    for i in range(8):
        paint(data / "train" / "red" / f"more{i}.jpg", COLORS[1], seed=600 + i)
    assert audit_json(data, capsys, code=1)["imbalance"] == 5.0
    expected = (
        "- the largest class has 5.0 times as many photos as the smallest; to find more photos of the small ones, at "
        "the price of more false alarms, add --class-frequencies equal\n"
    )
    assert expected in audit_text(data, capsys, code=1)


def test_text_lists_ten_files_of_a_kind_and_json_lists_all(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(13):
        (data / "train" / "red" / f"bad{i:02}.jpg").write_bytes(b"x")
    text = audit_text(data, capsys, code=1)
    assert "... and 3 more (use --json to list all)" in text
    assert "bad09.jpg" in text
    assert "bad10.jpg" not in text
    assert len(audit_json(data, capsys, code=1)["damaged"]) == 13


def test_a_second_audit_gives_the_same_findings(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second audit reads the fingerprints from the cache."""
    shutil.copy(data / "train/red/red.001.jpg", data / "valid/red/z.jpg")
    (data / "train/red/bad.jpg").write_bytes(b"x")
    assert audit_json(data, capsys, code=1) == audit_json(data, capsys, code=1)


# Training on a folder with problems. `fit_head` is replaced, as these tests only check whether training starts.


class Started(Exception):  # noqa: N818
    pass


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_weights: Path) -> Any:
    from finetune import pipeline

    seen: dict[str, Any] = {}

    def fit_head(
        config: Config, folder: Path, network: Any, compute: Any, batches: Any, prepared: Any, **more: Any
    ) -> Progress:
        seen.update({split: len(batches[split]) for split in batches})
        raise Started

    monkeypatch.setattr(pipeline, "fit_head", fit_head)

    def start(data: Path, **options: Any) -> dict[str, Any]:
        config = Config(data_dir=data, backbone="tiny", weights=str(tiny_weights), output_dir=tmp_path / "run", **options)
        config = replace(config, feature_cache=False)  # nothing is computed before the first epoch
        with pytest.raises(Started):
            pipeline.train(config)
        return seen

    return start


@pytest.mark.parametrize("make", SIMILARITY_FILES)
def test_leakage_stops_training_until_it_is_allowed(tmp_path: Path, drawn: Path, train: Any, make: Any) -> None:
    data = Path(shutil.copytree(drawn, tmp_path / "data"))
    make(data / "train/cats/cats.0001.jpg", data / "valid/cats/z.jpg")
    with pytest.raises(DataError, match=r"1 photo in both training and validation .*--allow-leakage"):
        train(data)
    assert not (tmp_path / "run").exists()
    assert train(data, allow_leakage=True) == {"train": 12, "valid": 7}


def test_a_class_mismatch_stops_training_until_it_is_allowed(tmp_path: Path, data: Path, train: Any) -> None:
    paint(data / "valid/green/1.jpg", COLORS[2], seed=80)
    with pytest.raises(DataError, match=r"only in validation: green\)\. .*--allow-class-mismatch"):
        train(data)
    assert not (tmp_path / "run").exists()
    assert train(data, allow_class_mismatch=True) == {"train": 8, "valid": 4}


def test_an_empty_class_stops_training_until_it_is_allowed(tmp_path: Path, data: Path, train: Any) -> None:
    for photo in (data / "train/red").iterdir():
        photo.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"train/red has no readable photos\. .*--allow-class-mismatch"):
        train(data)
    assert train(data, allow_class_mismatch=True) == {"train": 4, "valid": 4}


@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_split_without_readable_photos_always_stops_training(data: Path, train: Any, split: str) -> None:
    for photo in (data / split[:5]).glob("*/*.jpg"):
        photo.write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"no readable photos for {split}"):
        train(data, allow_class_mismatch=True)


def stopped_with(message: str, data: Path, train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Training stops with the message, and the audit explains it."""
    with pytest.raises(DataError) as raised:
        train(data)
    assert str(raised.value) == message
    capsys.readouterr()
    assert audit_text(data, capsys, code=1).splitlines()[-1] == f"Training on this folder fails: {message}"


@pytest.mark.parametrize(
    ("photos", "description"),
    [(0, "test has no class folders"), (1, "test has no class folders and 1 photo of its own"),
     (4, "test has no class folders and 4 photos of its own")],
)  # fmt: skip
def test_an_unlabeled_validation_folder_stops_training(
    tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str], photos: int, description: str
) -> None:
    data = color_folder(tmp_path / "data", train=4, valid=0)
    (data / "test").mkdir()
    for i in range(photos):
        paint(data / "test" / f"{i}.jpg", COLORS[0], seed=70 + i)
    stopped_with(
        f"{data}: {description}, so it cannot be used for validation. Sort its photos into class folders, or move the folder "
        f"test elsewhere to hold out some training photos.",
        data,
        train,
        capsys,
    )


@pytest.mark.parametrize("case", ["one photo", "one readable photo", "two copies"])
@pytest.mark.parametrize("below", ["train", "."])
def test_a_class_too_small_to_hold_out_a_photo_stops_training(
    tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str], case: str, below: str
) -> None:
    color_folder(tmp_path, train=4, valid=0)
    data = tmp_path / "train" if below == "." else tmp_path
    first, *others = sorted((tmp_path / "train" / "red").iterdir())
    for photo in others:
        photo.unlink()
    if case == "one readable photo":
        (first.parent / "z.jpg").write_bytes(b"damaged")
    elif case == "two copies":
        shutil.copy(first, first.with_name("z.jpg"))
    photos = "2 readable photos, all near duplicates" if case == "two copies" else "1 readable photo"
    stopped_with(
        f"{data}: the class red has {photos}, but at least two different ones are needed to hold one out for validation. Add "
        f"photos, or remove the class.",
        data,
        train,
        capsys,
    )


def test_the_audit_explains_every_error_of_training(data: Path, train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    photo = data / "train/red/red.001.jpg"
    shutil.copy(photo, data / "valid/red/z.jpg")
    stopped_with(
        f"{data}: 1 photo in both training and validation (train/red/red.001.jpg = valid/red/z.jpg), which "
        f"inflates the results. "
        f"Run `finetune audit {data}` to list them and delete the duplicates, or pass --allow-leakage.",
        data,
        train,
        capsys,
    )
    for photo in (data / "valid/red").iterdir():
        photo.write_bytes(b"damaged")
    stopped_with(
        f"{data}: valid/red has no readable photos. Add photos, remove the class, or pass --allow-class-mismatch.",
        data,
        train,
        capsys,
    )
    shutil.rmtree(data / "valid/red")
    stopped_with(
        f"{data}: classes differ between the splits (only in training: red). Use the same classes in "
        f"every split, or pass "
        f"--allow-class-mismatch.",
        data,
        train,
        capsys,
    )


def test_damaged_photos_are_not_used_for_training(data: Path, train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "train/red/red.001.jpg").write_bytes(b"damaged")
    (data / "valid/blue/empty.jpg").write_bytes(b"")
    assert train(data) == {"train": 7, "valid": 4}
    assert "- 2 damaged files (skipped)" in capsys.readouterr().out


def test_the_hold_out_keeps_near_duplicates_in_one_split(tmp_path: Path, photo_folder: PhotoFolder, train: Any) -> None:
    """Some photos have a smaller copy. A random hold-out would put copies of training photos into validation."""
    data = photo_folder(tmp_path / "data", train=10, valid=0)
    for photo in sorted((data / "train").glob("*/*.jpg"))[::4]:
        _shrink(photo, photo.with_name(f"small-{photo.name}"))
    counts = train(data, valid_fraction=0.5)
    assert sum(counts.values()) == 25
    assert counts["valid"] >= 4


def test_a_folder_of_none_of_the_classes_is_named_as_what_it_is(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        paint(data / "valid" / "none" / f"{number}.jpg", COLORS[3], seed=900 + number)
    found = audit_json(data, capsys, code=0)
    assert found["neither"] == {"valid/none": 2}
    assert found["counts"] == {"train": {"blue": 4, "red": 4}, "valid": {"blue": 2, "red": 2}}
    assert (
        "Note: valid/none has 2 photos of none of the classes. They belong to no class and measure how many such photos the "
        "model recognizes."
    ) in audit_text(data, capsys, code=0)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_photos_of_none_of_the_classes_are_opened_and_compared(
    data: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    none = data / split / "none"
    paint(none / "a.jpg", COLORS[3], seed=900)
    shutil.copy(none / "a.jpg", none / "b.jpg")
    shutil.copy(data / "train/red/red.001.jpg", none / "c.jpg")
    (none / "damaged.jpg").write_bytes(b"x")
    found = audit_json(data, capsys, code=1)
    assert set(found["damaged"]) == {f"{split}/none/damaged.jpg"}
    assert found["duplicates"] == [[f"{split}/none/a.jpg", f"{split}/none/b.jpg"]]
    assert found["conflicts"] == [sorted([f"{split}/none/c.jpg", "train/red/red.001.jpg"])]
    assert (found["leakage"], found["neither"]) == ([], {f"{split}/none": 3})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_of_none_of_the_classes_are_opened_and_compared(
    data: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    photos = sorted((data / "train").glob("*/*.jpg"))
    rows = [{"image": photo.relative_to(data).as_posix(), "label": photo.parent.name} for photo in photos]
    paint(data / "teapot.jpg", COLORS[3], seed=900)
    shutil.copy(data / "teapot.jpg", data / "teapot-copy.jpg")
    shutil.copy(photos[0], data / "blue.jpg")
    rows += [{"image": name, "label": "none"} for name in ("teapot.jpg", "teapot-copy.jpg", "blue.jpg", "lost.jpg")]
    table = data / f"labels.{suffix}"
    write = pq.write_table if suffix == "parquet" else pa_csv.write_csv
    write(pa.Table.from_pylist(rows), table)
    assert main(["audit", "--labels", str(table), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["damaged"] == {"lost.jpg": "cannot be read (No such file or directory)"}
    assert found["duplicates"] == [["teapot-copy.jpg", "teapot.jpg"]]
    assert found["conflicts"] == [["blue.jpg", rows[0]["image"]]]
    assert found["neither"] == {table.name: 3}


def test_training_measures_all_photos_of_none_of_the_classes_that_the_audit_names(
    data: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(data / "train/none/a.jpg", COLORS[3], seed=900)
    (data / "train/none/damaged.jpg").write_bytes(b"x")
    train(data)
    printed = capsys.readouterr().out
    assert "- 1 damaged file (skipped)\n" in printed
    assert "Note: train/none has 1 photo of none of the classes." in printed


def test_class_names_that_probably_mean_the_same_are_named_with_their_counts(
    data: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, split in ((900, "train"), (901, "valid")):
        paint(data / split / "Red" / "a.jpg", COLORS[1], seed=seed)
    found = audit_json(data, capsys, code=1)
    assert found["similar_classes"] == [{"Red": 2, "red": 6}]
    warning = "- 2 photos are labeled 'Red', 6 'red'; if this is one class, move its photos into one folder\n"
    assert warning in audit_text(data, capsys, code=1)
    train(data)
    assert warning in capsys.readouterr().out


def test_labels_of_a_table_that_probably_mean_the_same_are_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = sorted((data / "train").glob("*/*.jpg"))
    labels = {photo: {"red": "dogs", "blue": "cats"}[photo.parent.name] for photo in photos} | {
        photos[0]: "cat",
        photos[-1]: "Dogs ",
    }
    rows = [f"{photo.relative_to(data)},{label}" for photo, label in labels.items()]
    (data / "labels.csv").write_text("\n".join(["image,label", *rows]))
    assert main(["audit", "--labels", str(data / "labels.csv")]) == 1
    printed = capsys.readouterr().out
    fix = "if this is one class, write its label alike in every row"
    assert f"- 1 photo is labeled 'Dogs', 3 'dogs'; {fix}\n" in printed
    assert f"- 1 photo is labeled 'cat', 3 'cats'; {fix}\n" in printed


def test_every_reason_why_training_fails_is_named(data: Path, train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(data / "train/red/red.001.jpg", data / "valid/red/z.jpg")
    for split in ("train", "valid"):
        (data / split / "green").mkdir()
        (data / split / "green" / "x.jpg").write_bytes(b"damaged")
    paint(data / "valid/black/1.jpg", COLORS[3], seed=900)
    reasons = [
        "classes differ between the splits (only in validation: black). Use the same classes in every split, or pass "
        "--allow-class-mismatch.",
        "train/green, valid/green have no readable photos. Add photos, remove the classes, or pass --allow-class-mismatch.",
        f"1 photo in both training and validation (train/red/red.001.jpg = valid/red/z.jpg), which inflates the results. Run "
        f"`finetune audit {data}` to list them and delete the duplicates, or pass --allow-leakage.",
    ]
    listed = [f"  {number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    with pytest.raises(DataError) as raised:
        train(data)
    assert str(raised.value).splitlines() == [f"{data} cannot be trained on for 3 reasons:", *listed]
    capsys.readouterr()
    assert audit_text(data, capsys, code=1).splitlines()[-4:] == ["Training on this folder fails for 3 reasons:", *listed]
    with pytest.raises(DataError, match=f"^{data}: 1 photo in both training and validation"):
        train(data, allow_class_mismatch=True)
