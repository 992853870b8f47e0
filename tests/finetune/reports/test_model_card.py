"""The model card of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.reports.model_card import MAX_LISTED_CLASSES, write_model_card

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
