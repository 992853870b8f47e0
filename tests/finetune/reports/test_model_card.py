"""The model card of a bundle."""

from __future__ import annotations

import html
import json
from pathlib import Path

from finetune.reports.model_card import MAX_LISTED_CLASSES, write_model_card
from service.web.layout import render_markdown

SHIPPED = Path(__file__).resolve().parents[3] / "models" / "shipped" / "dogs-vs-cats"


def test_the_card_of_many_classes_lists_the_lowest_recalls(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(1000)]
    manifest = json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))
    recall = {name: {"value": i / 1000, "low": 0.0, "high": 1.0} for i, name in enumerate(names)}
    manifest["classes"] = names
    manifest["metrics"] |= {"classes": names, "recall": recall, "precision": dict.fromkeys(names)}
    manifest["provenance"]["dataset"]["photos"] = {"train": dict.fromkeys(names, 7) | {"class 3": 5}}
    write_model_card(tmp_path / "README.md", manifest)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "An image classifier for 1,000 classes (class 0, class 1, class 2, ..., class 999):" in card
    assert "Photos: train: 6,998 of 1,000 classes, 5 to 7 each." in card
    assert f"Of 1,000 classes, the {MAX_LISTED_CLASSES} with the lowest recall. All: `manifest.json`." in card
    assert [name for name in names if f"| recall of {name} |" in card] == names[:MAX_LISTED_CLASSES]
    assert len(card) < 10_000


LIMIT = {
    "max_score": 1.25, "requested": 0.01, "expected": 0.01, "low": 0.005, "high": 0.016, "images": 1400, "sample": 400,
    "sample_low": 0.0, "sample_high": 0.0225, "source": "training and validation, out of fold",
}  # fmt: skip
OOD = {"method": "distance", "images": 1000, "bytes": 340_000, "microseconds": 54.2, "limit": LIMIT}


def card_of(tmp_path: Path, ood: object, measured: object) -> str:
    manifest = json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))
    metrics = {**manifest["metrics"], "ood": measured}
    write_model_card(tmp_path / "README.md", {**manifest, "ood": ood, "metrics": metrics})
    return (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_card_states_how_well_other_photos_are_recognized(tmp_path: Path) -> None:
    interval = {"value": 0.75, "low": 0.5, "high": 0.875}
    measured = {"photos": 400, "neither_photos": 429, "caught": interval, "false_alarms": interval, "auroc": interval}
    card = card_of(tmp_path, OOD, measured)
    assert "Its OOD score (out of distribution) is then above 1.25." in card
    assert "| caught, of 429 photos of none of the classes | 0.7500 | 0.5000 to 0.8750 |" in card
    assert "It takes 0.34 MB and 54 microseconds per image." in card
    assert "How many photos of none of the classes it recognizes was not measured." in card_of(
        tmp_path, OOD, {**measured, "caught": None}
    )


def test_the_card_of_a_bundle_without_a_score_warns(tmp_path: Path) -> None:
    card = card_of(tmp_path, None, None)
    assert "has no OOD score. Any other photo is still labeled as one of them, often with high confidence." in card


def test_class_names_are_not_formatted(tmp_path: Path) -> None:
    names = ["a|b", "*bold*", "`code`", "<b>", "[a](b)", "back\\slash", "hot_dog"]
    manifest = json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))
    value = {"value": 0.5, "low": 0.0, "high": 1.0}
    manifest |= {"classes": names, "name": "cats|*dogs*"}
    manifest["metrics"] |= {"classes": names, "recall": dict.fromkeys(names, value), "precision": dict.fromkeys(names, value)}
    manifest["provenance"]["dataset"]["photos"] = {"train": dict.fromkeys(names, 7)}
    write_model_card(tmp_path / "README.md", manifest)
    page = html.unescape(render_markdown((tmp_path / "README.md").read_text(encoding="utf-8")))
    assert "<h2>cats|*dogs*</h2>" in page
    assert f"An image classifier for {', '.join(names[:-1])} and {names[-1]}:" in page
    assert "train: " + ", ".join(f"7 {name}" for name in names) in page
    for name in names:
        for measure in ("recall", "precision"):
            assert f"<td>{measure} of {name}</td>\n<td>0.5000</td>\n<td>0.0000 to 1.0000</td>" in page
