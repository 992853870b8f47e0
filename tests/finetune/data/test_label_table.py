"""Tables of labels: formats, encodings, bad rows, and the dataset that they give."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.image_folder import NO_LABEL, Sample, read_dataset, read_split
from finetune.data.label_table import LabelRow, read_label_table
from models.errors import DataError
from tests.helpers.tiny_network import color_folder, paint

ROWS = [
    {"image": "a/1.jpg", "label": "cat", "split": "train", "group": "p1", "camera": "left, upper"},
    {"image": "a/2.jpg", "label": "cat", "split": "val", "group": "p2", "camera": 'the "big" one'},
    {"image": "b/1.jpg", "label": "dog", "split": "Training", "group": "p1", "camera": "line\nbreak"},
    {"image": "b/2.jpg", "label": "dog", "split": "test", "group": "", "camera": ""},
]


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], *, separator: str = ",", encoding: str = "utf-8") -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.getvalue().encode(encoding, "surrogateescape"))
    return path


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def read(path: Path) -> list[LabelRow]:
    return list(read_label_table(path, path.parent).rows)


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_label_table(path, path.parent)
    return str(caught.value)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return touch(tmp_path, "a/1.jpg")


WRITERS: dict[str, Callable[[Path, Sequence[Mapping[str, object]]], Path]] = {
    "csv": lambda folder, rows: write_csv(folder / "t.csv", rows),
    "excel": lambda folder, rows: write_csv(folder / "t.CSV", rows, separator=";", encoding="utf-8-sig"),
    "utf-16": lambda folder, rows: write_csv(folder / "t.csv", rows, encoding="utf-16"),
    "utf-16 without a mark": lambda folder, rows: write_csv(folder / "t.csv", rows, encoding="utf-16-le"),
    "tsv": lambda folder, rows: write_csv(folder / "t.tsv", rows, separator="\t"),
    "bars": lambda folder, rows: write_csv(folder / "t.csv", rows, separator="|"),
    "jsonl": lambda folder, rows: write_jsonl(folder / "t.jsonl", rows),
    "parquet": lambda folder, rows: write_parquet(folder / "t.parquet", rows),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_rows(root: Path, kind: str) -> None:
    table = read_label_table(WRITERS[kind](root, ROWS), root)
    assert [(row.image, row.label, row.split, row.group, row.facets) for row in table.rows] == [
        ("a/1.jpg", "cat", "train", "p1", {"camera": "left, upper"}),
        ("a/2.jpg", "cat", "valid", "p2", {"camera": 'the "big" one'}),
        ("b/1.jpg", "dog", "train", "p1", {"camera": "line break"}),
        ("b/2.jpg", "dog", "test", "", {}),
    ]
    assert (table.facets, table.has_groups, table.repeated) == (("camera",), True, 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], ["1", "2"]),
        ([1.0, 2.0, None], ["1", "2"]),
        ([True, False], ["false", "true"]),
        (["1", "01"], ["01", "1"]),
        ([0.5, 2.0], ["0.5", "2"]),
    ],
    ids=["integers", "floats with a gap", "booleans", "text", "fractions"],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_labels_that_are_numbers_or_booleans_become_text(
    root: Path, kind: str, values: list[object], expected: list[str]
) -> None:
    rows = [{"image": f"{i}.jpg", "label": value} for i, value in enumerate(values) if value is not None]
    if None in values:
        rows.append({"image": "a/1.jpg", "label": None})
        path = WRITERS[kind](root, rows)
        assert "column label: '', expected a class name. Fix or remove the row." in error_of(path)
        return
    touch(root, "0.jpg")
    assert [row.label for row in read(WRITERS[kind](root, rows))] == expected


def test_numbers_in_text_are_not_changed(root: Path) -> None:
    rows = [{"image": "a/1.jpg", "label": "1"}, {"image": "b.jpg", "label": "1.0"}, {"image": "c.jpg", "label": "007"}]
    assert [row.label for row in read(write_csv(root / "t.csv", rows))] == ["007", "1", "1.0"]


def test_a_gap_in_a_column_of_floats_is_empty_and_other_columns_keep_their_values(root: Path) -> None:
    table = pa.table(
        {
            "image": ["a/1.jpg", "b.jpg"],
            "label": pa.array(["x", "nan"]).dictionary_encode(),
            "age": pa.array([31.0, float("nan")]),
            "box": [[1, 2], None],
            "__index_level_0__": [5, 6],
        }
    )
    pq.write_table(table, root / "t.parquet")
    assert [(row.label, row.facets) for row in read(root / "t.parquet")] == [
        ("nan", {}),
        ("x", {"age": "31", "box": "[1, 2]"}),
    ]


BAD_VALUES = [
    ({"label": ""}, "column label: '', expected a class name"),
    ({"label": "Unlabeled"}, "column label: 'Unlabeled', expected another name, as this one is reserved for photos without"),
    ({"label": "a/b"}, "column label: 'a/b', expected a class name in UTF-8 of up to 200 characters without / and \\"),
    ({"label": "é".encode("latin-1").decode("utf-8", "surrogateescape")}, "column label: '\\udce9', expected a class name in"),
    ({"image": ""}, "column image: '', expected the path of a file"),
    ({"image": "/data/1.jpg"}, "column image: '/data/1.jpg', expected a path relative to the data folder"),
    ({"image": "C:\\data\\1.jpg"}, "column image: 'C:\\\\data\\\\1.jpg', expected a path relative to the data folder"),
    ({"image": "https://x/1.jpg"}, "column image: 'https://x/1.jpg', expected a path relative to the data folder"),
    ({"image": "a/../../1.jpg"}, "column image: 'a/../../1.jpg', expected a path inside the data folder"),
    ({"split": "fold 3"}, "column split: 'fold 3', expected train, valid (or val, dev, eval) and test"),
    ({"split": ""}, "column split: '', expected train, valid (or val, dev, eval) and test"),
    ({"image": "./b//1.jpg", "label": "cat"}, "column label: 'cat', expected 'dog' as for the same image in line 4"),
    ({"image": "b/1.jpg", "label": "dog", "split": "test"}, "column split: 'test', expected 'train' as for the same image in"),
    (
        {"image": "b/1.jpg", "label": "dog", "split": "train", "group": "p9"},
        "column group: 'p9', expected 'p1' as for the same image in line 4",
    ),
    (
        {"image": "b/1.jpg", "label": "dog", "split": "train", "group": "p1", "camera": "x"},
        "column camera: 'x', expected 'line break' as for the same image in line 4",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES, ids=[message[:60] for _, message in BAD_VALUES])
def test_a_bad_row_is_named_with_its_line_column_value_and_what_was_expected(
    root: Path, changes: dict[str, str], message: str
) -> None:
    path = write_csv(root / "t.csv", [*ROWS, {**ROWS[0], "image": "c.jpg", **changes}])
    assert error_of(path).startswith(f"{path}, line 7, {message}")  # the fourth row has a line break
    assert error_of(path).endswith(". Fix or remove the row.")


def test_many_bad_rows_are_named_together_and_bounded(root: Path) -> None:
    rows = [{"image": f"{i}.jpg", "label": "cat" if i % 2 else ""} for i in range(50)]
    lines = error_of(write_csv(root / "t.csv", rows)).splitlines()
    assert lines[0] == f"{root / 't.csv'} has 25 bad rows. Fix or remove them:"
    assert lines[1] == "  line 2, column label: '', expected a class name"
    assert len(lines) == 12
    assert lines[-1] == "  and 15 more"


def test_a_row_of_a_parquet_file_is_named_by_its_number(root: Path) -> None:
    path = write_parquet(root / "t.parquet", [{"image": "a/1.jpg", "label": "cat"}, {"image": "b.jpg", "label": None}])
    assert error_of(path) == f"{path}, row 2, column label: '', expected a class name. Fix or remove the row."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            "",
            "has no column 'image' (found: no columns). The header needs image and label; split, group",
        ),
        ("t.csv", "file,label\n1.jpg,cat", "has no column 'image' (found: file, label). The header needs image and label"),
        ("t.csv", "images,label\n1.jpg,cat", "has no column 'image' (found: images, label). Did you mean 'images'?"),
        ("t.csv", "image,class\n1.jpg,cat", "has no column 'label' (found: image, class)."),
        ("t.csv", "image,label,Label\n1.jpg,cat,cat", "has the column 'label' twice. Rename or remove one of them."),
        ("t.csv", "image,label\n", "has no rows. Add a row for each image, with at least image and label."),
        ("t.csv", "image,label\n1.jpg\n", ", line 2: '1 cells', expected 2 as in the header. Fix or remove the row."),
        ("t.csv", "image,label\n1.jpg,cat,x\n", ", line 2: '3 cells', expected 2 as in the header. Fix or remove the row."),
        ("t.csv", 'image,label\n"1.jpg,cat\n', "cannot be read as a table of labels (unexpected end of data). Save it again."),
        ("t.jsonl", '{"image": "1.jpg"\n', ", line 1: not JSON (Expecting ',' delimiter: line 1 column 18 (char 17))."),
        ("t.jsonl", "[1, 2]\n", ", line 1: '[1, 2]' is not an object. Expected {...}."),
        ("t.parquet", "image", "cannot be read as Parquet ("),
        ("t.xlsx", "", "is not a table of labels. Expected a file that ends with .csv, .tsv, .parquet, .jsonl."),
        ("t.csv", "image,label\nx.jpg,cat\n", "None of the first 1 images of "),
    ],
)
def test_a_table_that_cannot_be_used_is_explained_in_a_sentence(root: Path, name: str, content: str, message: str) -> None:
    (root / name).write_text(content)
    assert message in error_of(root / name)
    assert str(root / name) in error_of(root / name)


def test_a_missing_table_and_a_missing_folder_are_errors(root: Path) -> None:
    assert error_of(root / "no.csv") == (
        f"Cannot read the table of labels {root / 'no.csv'} (No such file or directory). Check the path."
    )
    with pytest.raises(DataError, match=r"No such folder: .*nowhere\. --data-dir is the folder that the paths in t\.csv are"):
        read_label_table(write_csv(root / "t.csv", ROWS), root / "nowhere")


def test_a_column_of_images_in_a_parquet_file_is_an_error(root: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "1.jpg"}], "label": ["cat"]}), root / "t.parquet")
    assert "column 'image': expected text or numbers, got struct<bytes: binary, path: string>." in error_of(root / "t.parquet")


def test_repeated_rows_count_once(root: Path) -> None:
    table = read_label_table(write_csv(root / "t.csv", [*ROWS, ROWS[0], {**ROWS[0], "image": "./a//1.jpg"}]), root)
    assert (len(table.rows), table.repeated) == (4, 2)


def test_the_order_of_rows_and_columns_does_not_matter(root: Path) -> None:
    rows = read(write_csv(root / "t.csv", ROWS))
    other = read(write_csv(root / "u.csv", [dict(reversed(row.items())) for row in reversed(ROWS)]))
    assert [(row.image, row.label, row.facets) for row in rows] == [(row.image, row.label, row.facets) for row in other]


def test_spaces_upper_case_and_unnamed_columns_in_the_header_are_accepted(root: Path) -> None:
    (root / "t.csv").write_text("sep=;\n; Image ;LABEL;Unnamed: 3\n0; a/1.jpg ; cat ;x\n")
    (row,) = read(root / "t.csv")
    assert (row.number, row.image, row.label, row.facets) == (3, "a/1.jpg", "cat", {})


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_the_unicode_form_of_names_does_not_matter(tmp_path: Path, on_disk: str, in_table: str) -> None:
    def form(kind: str, text: str) -> str:
        return unicodedata.normalize(kind, text)  # type: ignore[arg-type]

    touch(tmp_path, form(on_disk, "Bébés/été.jpg"))
    rows = [{"image": form(in_table, "Bébés/été.jpg"), "label": form(in_table, "bébé")}]
    (row,) = read(write_csv(tmp_path / "t.csv", rows))
    assert row.label == form("NFC", "bébé")
    assert (tmp_path / row.image).is_file()


def test_a_file_name_that_is_not_utf8_is_found(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.jpg")
    (tmp_path / name).touch()
    (row,) = read(write_csv(tmp_path / "t.csv", [{"image": name, "label": "cat"}]))
    assert (tmp_path / row.image).is_file()


def test_a_large_table_is_read_without_looking_at_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"image": f"{i % 7}/{i:06d}ä.jpg", "label": i % 5, "group": f"patient {i // 10}", "age": i % 90, "id": i}
        for i in range(100_000)
    ]
    touch(tmp_path, *(str(row["image"]) for row in rows[:8]))
    path = write_csv(tmp_path / "t.csv", rows)
    calls: Counter[str] = Counter()
    for name in ("stat", "lstat", "listdir", "scandir", "open"):
        original = getattr(os, name)

        def count(*args: object, original: Callable[..., object] = original, name: str = name, **more: object) -> object:
            calls[name] += 1
            return original(*args, **more)

        monkeypatch.setattr(os, name, count)
    dataset = read_dataset(tmp_path, labels=path)
    assert len(dataset.samples) == 100_000
    assert 0 < calls.total() < 300


# The dataset of a table


def samples_of(samples: Sequence[Sample]) -> list[tuple[str, int, str]]:
    return [(sample.name, sample.label, sample.split) for sample in samples]


@pytest.mark.parametrize("valid", [0, 3], ids=["held out", "validation folder"])
def test_a_table_of_a_folder_gives_the_dataset_of_the_folder(tmp_path: Path, valid: int) -> None:
    data = color_folder(tmp_path / "data", train=10, valid=valid)
    rows = [
        {"image": file.relative_to(data).as_posix(), "label": file.parent.name} | ({"split": file.parts[-3]} if valid else {})
        for file in sorted(data.rglob("*.jpg"), reverse=True)
    ]
    by_folder, by_table = read_dataset(data), read_dataset(data, labels=write_csv(tmp_path / "t.csv", rows))
    assert samples_of(by_table.samples) == samples_of(by_folder.samples)
    assert (by_table.classes, by_table.split_from_train) == (by_folder.classes, by_folder.split_from_train)


def test_the_test_split_validates_only_if_there_is_no_other(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg")
    dataset = read_dataset(tmp_path, labels=write_csv(tmp_path / "t.csv", ROWS))
    assert [(sample.name, sample.split) for sample in dataset.samples] == [
        ("a/1.jpg", "train"),
        ("b/1.jpg", "train"),
        ("a/2.jpg", "valid"),
    ]
    assert dataset.test_split == "test"
    dataset = read_dataset(tmp_path, labels=write_csv(tmp_path / "t.csv", [row for row in ROWS if row["split"] != "val"]))
    assert [sample.name for sample in dataset.in_split("valid")] == ["b/2.jpg"]
    assert dataset.test_split is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "a/1.jpg", "label": "cat"}], "has only one class for training (cat). At least two are needed."),
        (
            [{"image": "a/1.jpg", "label": "cat", "split": "test"}],
            "has no rows of the split train. Add some, or remove the column 'split'.",
        ),
    ],
)
def test_a_table_needs_two_classes_for_training(root: Path, rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(root, labels=write_csv(root / "t.csv", rows))
    assert str(caught.value) == f"{root / 't.csv'} {message}"


def test_a_split_of_a_table_is_read_for_an_evaluation(root: Path) -> None:
    path = write_csv(root / "t.csv", ROWS)
    samples = read_split(root, "test", ["dog", "cat"], labels=path).samples
    assert samples_of(samples) == [("b/2.jpg", 0, "test")]
    samples = read_split(root, None, ["dog", "cat"], labels=path).samples
    assert samples_of(samples) == [("a/2.jpg", 1, "valid")]
    with pytest.raises(DataError, match=r"has no rows of the split 'extra'\. Set --split to one of test, train, valid\."):
        read_split(root, "extra", ["dog", "cat"], labels=path)
    with pytest.raises(DataError, match="has the class 'dog', but the bundle's classes are cat, cow"):
        read_split(root, "test", ["cat", "cow"], labels=path)


def test_all_images_of_a_table_without_splits_are_evaluated(root: Path) -> None:
    path = write_csv(root / "t.csv", [{"image": row["image"], "label": row["label"]} for row in ROWS])
    samples = read_split(root, None, ["cat", "dog"], labels=path).samples
    assert {sample.split for sample in samples} == {"all"}
    assert len(samples) == 4
    with pytest.raises(DataError, match=r"has no column 'split'\. Remove --split to evaluate all of its images\."):
        read_split(root, "valid", ["cat", "dog"], labels=path)


def test_rows_of_none_of_the_classes_are_not_a_class(root: Path) -> None:
    rows = [*ROWS, {**ROWS[0], "image": "c.jpg", "label": "None"}, {**ROWS[3], "image": "d.jpg", "label": "neither"}]
    path = write_csv(root / "t.csv", rows)
    dataset = read_dataset(root, labels=path)
    assert dataset.classes == ("cat", "dog")
    assert [(sample.name, sample.label, sample.split) for sample in dataset.neither] == [("c.jpg", NO_LABEL, "train")]
    listed = read_split(root, "test", ["cat", "dog"], labels=path)
    assert [[sample.name for sample in samples] for samples in (listed.samples, listed.neither)] == [["b/2.jpg"], ["d.jpg"]]
    listed = read_split(root, "test", ["cat", "dog", "neither"], labels=path)
    assert [[sample.name for sample in samples] for samples in (listed.samples, listed.neither)] == [["b/2.jpg", "d.jpg"], []]


def test_extra_data_may_be_a_folder_or_a_table(tmp_path: Path) -> None:
    data = color_folder(tmp_path / "data", train=2, valid=1)
    more = color_folder(tmp_path / "more", train=1, valid=0)
    paint(tmp_path / "production" / "x.jpg", (255, 0, 0), seed=77)
    rows = [
        {"image": "x.jpg", "label": "red", "split": "train", "site": "north"},
        {"image": "y.jpg", "label": "red", "split": "test", "site": "north"},
    ]
    table = write_csv(tmp_path / "production" / "labels.csv", rows)
    extra = [sample for sample in read_dataset(data, extra=[more, table]).samples if sample.is_extra]
    folder = ["extra-1/train/blue/blue.000.jpg", "extra-1/train/red/red.000.jpg"]
    assert [sample.name for sample in extra] == [*folder, "extra-2/x.jpg"]
    assert (extra[-1].split, extra[-1].facets) == ("train", {"site": "north"})


# Groups


def grouped(root: Path, groups: Mapping[str, Mapping[str, int]], **columns: str) -> Path:
    """Write a table with so many images of each class in each group."""
    rows = [
        {"image": f"{group}-{label}-{i}.jpg", "label": label, "group": group, **columns}
        for group, counts in groups.items()
        for label, count in counts.items()
        for i in range(count)
    ]
    touch(root, str(rows[0]["image"]))
    return write_csv(root / "t.csv", rows)


def groups_by_split(samples: Sequence[Sample]) -> dict[str, set[str]]:
    splits: dict[str, set[str]] = {}
    for sample in samples:
        splits.setdefault(sample.split, set()).add(sample.group)
    return splits


@pytest.mark.parametrize("seed", range(5))
def test_the_hold_out_keeps_groups_together_and_classes_in_proportion(tmp_path: Path, seed: int) -> None:
    patients = {f"p{i}": {"ill": 3 + i % 5} if i % 4 == 0 else {"well": 2 + i % 7} for i in range(60)}
    dataset = read_dataset(tmp_path, labels=grouped(tmp_path, patients), seed=seed)
    splits = groups_by_split(dataset.samples)
    assert not splits["train"] & splits["valid"]
    for label in range(2):
        held = [sample.split == "valid" for sample in dataset.samples if sample.label == label]
        assert 0.15 < sum(held) / len(held) < 0.25
    assert dataset.split_groups == {}


def test_a_class_keeps_a_group_for_training(tmp_path: Path) -> None:
    patients = {"a": {"ill": 9}, "b": {"ill": 1}, "c": {"well": 5, "rare": 4}, "d": {"well": 5}}
    dataset = read_dataset(tmp_path, labels=grouped(tmp_path, patients))
    counts = Counter((sample.split, dataset.classes[sample.label]) for sample in dataset.samples)
    held = {("valid", "ill"): 1, ("valid", "well"): 5}
    assert counts == {("train", "ill"): 9, ("train", "rare"): 4, ("train", "well"): 5} | held


def test_a_group_of_extra_data_is_not_held_out(tmp_path: Path) -> None:
    path = grouped(tmp_path, {f"p{i}": {"ill": 2, "well": 2} for i in range(10)})
    extra = grouped(tmp_path / "more", {f"p{i}": {"ill": 1, "well": 1} for i in range(9)})
    dataset = read_dataset(tmp_path, labels=path, extra=[extra])
    assert groups_by_split(dataset.samples)["valid"] == {"p9"}
    assert dataset.split_groups == {}


def test_a_group_in_several_splits_is_found_also_in_the_test_split(tmp_path: Path) -> None:
    rows = [
        {"image": f"{i}.jpg", "label": "cat" if i % 2 else "dog", "split": split, "group": group}
        for i, (split, group) in enumerate(
            [("train", "a"), ("train", "b"), ("train", "b"), ("valid", "b"), ("valid", "c"), ("test", "a"), ("test", "")]
        )
    ]
    touch(tmp_path, "0.jpg")
    dataset = read_dataset(tmp_path, labels=write_csv(tmp_path / "t.csv", rows))
    assert dataset.split_groups == {"a": {"train": 1, "test": 1}, "b": {"train": 2, "valid": 1}}
