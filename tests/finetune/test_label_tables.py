"""Commands on a table of labels: audit, train, evaluate and cross-validation."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import finetune as python_interface
from finetune.config import from_mapping
from models.artifacts.atomic_io import sha256_of
from models.artifacts.bundle import open_bundle
from models.artifacts.reviews import Review, write_reviews
from models.errors import ConfigError
from tests.helpers.tiny_network import COLORS, finetune, paint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SITES = ("north", "south")


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def patient_rows(root: Path, *, patients: int = 12) -> list[dict[str, Any]]:
    """Paint four photos of each patient, two of each class, into one folder without class folders."""
    rows = []
    for patient in range(patients):
        for number in range(4):
            label = number % 2
            name = f"scan-{patient:02d}-{number}.png"
            paint(root / "scans" / name, COLORS[label], seed=100 * patient + number)
            rows.append({"image": f"scans/{name}", "label": label, "group": f"patient {patient}", "site": SITES[patient % 2]})
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> SimpleNamespace:
    """A bundle that was trained on a table without splits, and one photo of it is missing."""
    root = tmp_path_factory.mktemp("patients")
    rows = patient_rows(root / "data")
    rows.append({**rows[0], "image": "scans/lost.png"})
    table = write_table(root / "data" / "labels.csv", rows)
    flags = ("--labels", table, "--backbone", "tiny", "--weights", tiny_weights, "--output-dir", root / "run")
    code, out, err = finetune("train", *flags)
    assert (code, err) == (0, "")
    return SimpleNamespace(
        root=root, rows=rows, table=table, run=root / "run", out=out, bundle=open_bundle(root / "run/bundle")
    )


def groups_of(predictions: Path, rows: list[dict[str, Any]]) -> set[str]:
    with predictions.open(newline="", encoding="utf-8") as file:
        evaluated = {row["photo"] for row in csv.DictReader(file)}
    return {str(row["group"]) for row in rows if row["image"] in evaluated}


def test_a_network_trains_on_a_table_and_a_missing_image_is_damaged(trained: SimpleNamespace) -> None:
    assert trained.bundle.classes == ("0", "1")
    dataset = trained.bundle.manifest["provenance"]["dataset"]
    assert sum(sum(row.values()) for row in dataset["photos"].values()) == 48
    assert dataset["excluded"] == 1
    assert "scans/lost.png: cannot be read (No such file or directory)" in trained.out
    assert dataset["labels"]["rows"] == 49
    assert dataset["labels"]["has_groups"]
    assert "labels" not in trained.bundle.manifest["provenance"]["config"]
    card = (trained.bundle.path / "README.md").read_text(encoding="utf-8")
    assert "The labels come from a table of 49 rows" in card


def test_the_next_command_names_the_table(trained: SimpleNamespace) -> None:
    data = f"--data-dir {trained.table.parent} --labels {trained.table}"
    assert f"  finetune evaluate {trained.bundle.path} {data} --folds 5\n" in trained.out


def test_the_hold_out_has_complete_groups(trained: SimpleNamespace) -> None:
    held_out = groups_of(trained.run / "predictions.csv", trained.rows)
    with (trained.run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 4 * len(held_out)
    assert 2 <= len(held_out) <= 3


def test_training_reports_slices_and_intervals_of_groups(trained: SimpleNamespace) -> None:
    metrics = json.loads((trained.run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["groups"] == len(groups_of(trained.run / "predictions.csv", trained.rows))
    assert {(row["column"], row["value"]) for row in metrics["slices"]} == {("site", "north"), ("site", "south")}
    assert sum(row["photos"] for row in metrics["slices"]) == metrics["photos"]
    assert trained.bundle.manifest["metrics"]["slices"] == metrics["slices"]
    assert "worst slices  " in trained.out
    card = (trained.bundle.path / "README.md").read_text(encoding="utf-8")
    assert "| site = north | " in card
    with (trained.run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["photo"]: (row["group"], row["facet_site"]) for row in csv.DictReader(file)}
    expected = {row["image"]: (row["group"], row["site"]) for row in trained.rows}
    assert rows == {name: expected[name] for name in rows}


def test_a_group_in_two_splits_stops_training_and_is_audited(tmp_path: Path, tiny_weights: Path) -> None:
    rows = patient_rows(tmp_path, patients=4)
    for number, row in enumerate(rows):
        row["split"] = "valid" if number in (3, 14, 15) else "train"
    table = write_table(tmp_path / "labels.tsv", rows)
    table.write_text(table.read_text().replace(",", "\t"))
    code, out, _ = finetune("audit", "--labels", table)
    assert code == 1
    assert "- 2 groups of the table in several splits (leakage)" in out
    assert "Groups in several splits:\n  patient 0: 3 in train, 1 in valid\n  patient 3: 2 in train, 2 in valid\n" in out
    message = (
        f"{tmp_path}: 2 groups of the table in several splits (patient 0: 3 in train, 1 in valid), which inflates the results. "
        f"Run `finetune audit {tmp_path} --labels {table}` to list them and give all rows of a group the same split, or pass "
        "--allow-leakage."
    )
    assert out.splitlines()[-1] == f"Training on this folder fails: {message}"
    flags = ("--labels", table, "--backbone", "tiny", "--weights", tiny_weights, "--output-dir", tmp_path / "run")
    assert finetune("train", *flags)[::2] == (2, f"finetune: {message}\n")
    assert finetune("train", *flags, "--allow-leakage")[0] == 0


def test_a_table_with_bad_rows_is_an_input_error_also_for_programs(tmp_path: Path, tiny_weights: Path) -> None:
    table = write_table(tmp_path / "labels.csv", [{"image": "a.jpg", "label": "cat"}, {"image": "b.jpg", "label": ""}])
    message = f"{table}, line 3, column label: '', expected a class name. Fix or remove the row."
    assert finetune("audit", "--labels", table) == (2, "", f"finetune: {message}\n")
    code, out, err = finetune("audit", "--labels", table, "--json")
    assert (code, json.loads(out), err) == (2, {"error": message}, f"finetune: {message}\n")
    code, out, err = finetune("train", "--labels", table, "--backbone", "tiny", "--weights", tiny_weights)
    assert (code, err) == (2, f"finetune: {message}\n")


def test_no_group_is_divided_between_folds(
    trained: SimpleNamespace, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.evaluation import cross_validation

    folds: dict[str, set[int]] = {}
    assign = cross_validation.assign_folds

    def record(records: Any, labels: Any, **more: Any) -> Any:
        fold_of = assign(records, labels, **more)
        for item, fold in zip(records, fold_of.tolist(), strict=True):
            folds.setdefault(item.sample.group, set()).add(fold)
        return fold_of

    monkeypatch.setattr(cross_validation, "assign_folds", record)
    flags = ("--bundle", trained.bundle.path, "--labels", trained.table, "--weights", tiny_weights, "--folds", 3)
    code, out, _ = finetune("evaluate", *flags, "--output-dir", trained.root / "folds")
    assert code == 0
    assert len(folds) == 12
    assert {len(own) for own in folds.values()} == {1}
    assert json.loads((trained.root / "folds" / "evaluation.json").read_text())["folds"] == 3
    assert "48 photos correct" in out


def test_reviews_override_the_labels_of_a_table(trained: SimpleNamespace, tmp_path: Path, tiny_weights: Path) -> None:
    photos = [trained.table.parent / row["image"] for row in trained.rows[:3]]
    decisions = (("label", "1"), ("neither", ""), ("bad", ""))
    reviews = [
        Review(sha256_of(photo), photo.name, "0", decision, label, "", "", "")
        for photo, (decision, label) in zip(photos, decisions, strict=True)
    ]
    (tmp_path / "reviews.csv").write_bytes(write_reviews(reviews))
    flags = ("--labels", trained.table, "--backbone", "tiny", "--weights", tiny_weights, "--epochs", 1)
    code, out, err = finetune("train", *flags, "--reviews", tmp_path / "reviews.csv", "--output-dir", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "reviews.csv: 3 reviews (1 relabeled, 0 confirmed, 2 excluded, 0 unmatched)" in out
    assert "  scans/scan-00-0.png: 0 -> 1\n" in out
    bundle = open_bundle(tmp_path / "run" / "bundle")
    counts = bundle.manifest["provenance"]["dataset"]["photos"]
    assert {name: sum(row[name] for row in counts.values()) for name in ("0", "1")} == {"0": 22, "1": 24}
    code, out, _ = finetune("train", "--resume", "--output-dir", tmp_path / "run")
    assert code == 0
    assert f"The run in {tmp_path / 'run'} is already finished." in out


def test_the_python_interface_takes_a_table(trained: SimpleNamespace, tmp_path: Path) -> None:
    result = python_interface.evaluate(trained.bundle.path, labels=trained.table, output_dir=tmp_path / "all")
    assert len(result.predictions.image_names) == 48
    assert set(result.predictions.splits) == {"all"}
    with pytest.raises(ConfigError, match=r"^No data\. Pass data_dir or labels\.$"):
        python_interface.train()
    with pytest.raises(ConfigError, match=r"^No data\. Pass the data folder, or a table of labels with labels\.$"):
        python_interface.evaluate(trained.bundle.path)


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        (("LABELS=a/labels.csv",), "--labels a/labels.csv --backbone vgg16"),
        (("LABELS=a/labels.csv", "DATA=b"), "--labels a/labels.csv --data-dir b --backbone vgg16"),
        (("DATA=b",), "--data-dir b --backbone vgg16"),
    ],
)
def test_make_takes_a_table(variables: tuple[str, ...], flags: str) -> None:
    done = subprocess.run(["make", "-n", "finetune", *variables], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"finetune train {flags}" in done.stdout


def test_the_data_folder_is_that_of_the_table_unless_it_is_given() -> None:
    assert from_mapping({"labels": "a/b/labels.csv"}).data_dir == Path("a/b")
    assert from_mapping({"labels": "a/b/labels.csv", "data_dir": "data"}).data_dir == Path("data")
    with pytest.raises(ConfigError, match="--labels and --dataset cannot be combined"):
        from_mapping({"labels": "labels.csv", "dataset": "digits"})
