"""Suggestions begin with photos that the model is unsure about, and do not contain near copies of one after the other."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from models.artifacts.bundle import open_bundle
from service.inference.image_decoder import ImageDecoder
from service.settings import Settings
from service.studio import suggestions
from service.studio.data_sets import Photo
from service.studio.suggestions import Suggestion, classify, most_useful_first, spread_out


def test_each_row_is_the_least_similar_to_those_before_it() -> None:
    degrees = np.radians([0, 1, 90, 2, 40, 91])
    embeddings = np.stack([np.cos(degrees), np.sin(degrees)], axis=1).astype(np.float32) * np.float32(7)
    order = spread_out(embeddings)
    assert order[:3] == [0, 5, 4]
    assert sorted(order) == list(range(6))
    assert spread_out(embeddings[:0]) == []


def test_near_copies_of_a_photo_are_not_suggested_together(
    tiny_bundle: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suggestions, "UNSURE", 2.0)  # the model is unsure about every photo
    files = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in sorted(tiny_bundle.photos.glob("*/*"))}
    original = next(iter(files))
    image = Image.open(io.BytesIO(files[original]))
    for quality in range(90, 95):
        image.save(copy := io.BytesIO(), "JPEG", quality=quality)
        files[f"copy-{quality}.jpg"] = copy.getvalue()
    files["damaged.jpg"] = b"no image"
    found = classify(open_bundle(tiny_bundle.path), ImageDecoder.of(Settings(decode_timeout_s=300)), files.items())
    assert set(found) == set(files) - {"damaged.jpg"}
    assert found[original].label == "blue"
    first = list(found)
    assert found[first[0]].margin == min(suggestion.margin for suggestion in found.values())
    copies = [path for path in first if path == original or path.startswith("copy-")]
    assert sum(path in copies for path in first[:-5]) == 1
    assert sorted(first[-5:]) == sorted(copies[1:])


def test_photos_that_the_model_is_sure_of_follow_by_their_margin(
    tiny_bundle: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suggestions, "UNSURE", 0.0)
    files = {file.name: file.read_bytes() for file in sorted(tiny_bundle.photos.glob("*/*"))}
    found = classify(open_bundle(tiny_bundle.path), ImageDecoder.of(Settings(decode_timeout_s=300)), files.items())
    margins = [suggestion.margin for suggestion in found.values()]
    assert margins == sorted(margins)
    assert len(margins) == len(files)


def test_photos_are_shown_in_the_order_of_their_suggestions() -> None:
    photos = [Photo(path, 1, 1) for path in ("a", "b", "c", "d")]
    known = {"c": Suggestion("cats", 0.5, 0.1), "a": Suggestion("cats", 0.4, 0.0)}
    assert [photo.path for photo in most_useful_first(photos, known)] == ["c", "a", "b", "d"]
