"""A bundle of ``finetune threshold`` in the service: less certain photos get no label, over HTTP and in the gallery."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from finetune.evaluation.held_out import HeldOutPredictions
from finetune.evaluation.thresholds import write_thresholds
from finetune.metrics.operating_points import TopPredictions
from models.artifacts.bundle import Bundle, open_bundle
from service.web.layout import percent
from tests.helpers.server import Server, poll, serve
from tests.helpers.tiny_network import finetune

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with high thresholds for blue and red, as only the most certain predictions were all correct."""
    source = open_bundle(tiny_bundle.path)
    rng = np.random.default_rng(0)
    predicted = np.arange(3000) % 3
    confidences = np.where(np.arange(3000) < 1000, rng.uniform(0.5, 0.9999, 3000), rng.uniform(0.99995, 0.99999, 3000))
    labels = np.where((confidences < 0.9999) & (rng.random(3000) < 0.3), (predicted + 1) % 3, predicted)
    held_out = HeldOutPredictions(TopPredictions(labels, predicted, confidences), "out-of-fold", 5)
    targets = {"blue": 0.98, "red": 0.98}
    return write_thresholds(source, held_out, targets, tmp_path_factory.mktemp("thresholds") / "bundle")


@pytest.fixture(scope="module")
def server(bundle: Bundle, tiny_bundle: SimpleNamespace) -> Iterator[Server]:
    with serve(bundle.path, data_dir=tiny_bundle.data) as running:
        poll(lambda: running.get("/gallery").status == 200)
        yield running


def most_probable(row: dict[str, object]) -> str:
    probabilities = row["probabilities"]
    assert isinstance(probabilities, dict)
    return max(probabilities, key=probabilities.__getitem__)


def test_the_service_gives_no_label_below_the_threshold(server: Server, bundle: Bundle, tiny_bundle: SimpleNamespace) -> None:
    abstaining = 0
    for photo in sorted(Path(tiny_bundle.photos).rglob("*.jpg")):
        (row,) = server.post(photo.read_bytes()).json()["predictions"]
        best = most_probable(row)
        required = bundle.decision_rule.min_probability.get(best, 0.0)
        if row["probabilities"][best] < required:
            abstaining += 1
            assert row["label"] is None
            assert row["because"].startswith(f"not sure enough of {best}: ")
            assert row["because_code"] == "low_probability"
        elif row["in_distribution"] is not False:
            assert row["label"] == best
        (old,) = server.post(photo.read_bytes(), path="/predict?abstain=0").json()["predictions"]
        assert (old["label"], old["because_code"]) == (best, row["because_code"])
    assert abstaining > 0


def test_the_command_line_gives_no_label_below_the_threshold(bundle: Bundle, tiny_bundle: SimpleNamespace) -> None:
    code, out, _ = finetune("predict", "--bundle", bundle.path, tiny_bundle.photos, "--json")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    required = bundle.decision_rule.min_probability
    unsure = [row for row in rows if row["probabilities"][most_probable(row)] < required.get(most_probable(row), 0.0)]
    assert unsure
    assert {row["label"] for row in unsure} == {None}


def test_the_gallery_shows_the_thresholds_in_use(server: Server, bundle: Bundle) -> None:
    text = server.get("/gallery/threshold").body.decode()
    rows = re.findall(r"<bdi>(\w+)</bdi></a></th>(.*?)</tr>", text)
    shown = {name: html.unescape(re.findall(r"<td>([^<]*)</td>", cells)[-1]) for name, cells in rows}
    required = bundle.decision_rule.min_probability
    assert set(required) == {"blue", "red"}
    assert shown == {name: percent(required[name], 2) if name in required else "none" for name in bundle.classes}
