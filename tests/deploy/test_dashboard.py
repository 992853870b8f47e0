"""The dashboard, the alerts and the operator's guide use existing metrics only, and the guide documents every metric."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prometheus_client import Histogram

from service.http.errors import PROBLEM_TYPES
from service.telemetry.metrics import STAGES, Metrics

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))
GUIDE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
NAME = r"\b(?:classifier|http)_\w+"
ALL_EXPRESSIONS = [*EXPRESSIONS, *(rule["expr"] for rule in RULES)]


def metrics() -> dict[str, tuple[str, ...]]:
    """Return the name of every series with its labels."""
    series = {}
    for metric in vars(Metrics()).values():
        if not hasattr(metric, "_labelnames"):
            continue
        labels = tuple(metric._labelnames)
        (family,) = metric.describe()
        if isinstance(metric, Histogram):
            series |= {f"{family.name}_bucket": (*labels, "le"), f"{family.name}_sum": labels, f"{family.name}_count": labels}
        else:
            series[family.name + ("_total" if family.type == "counter" else "")] = labels
    return series


def families() -> set[str]:
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in metrics()}


def test_the_listed_series_are_the_scraped_ones() -> None:
    """``metrics()`` reads internals of prometheus_client, so it is compared with the rendered metrics."""
    recorded = Metrics()
    recorded.requests.labels("/predict", "POST", "200").inc()
    recorded.request_duration.labels("/predict").observe(1)
    scraped = {line.split("{")[0].split(" ")[0] for line in recorded.render().decode().splitlines() if not line.startswith("#")}
    assert {name for name in scraped if not name.endswith("_created")} <= set(metrics())
    assert {"http_requests_total", "http_request_duration_seconds_sum", "classifier_ready_workers"} <= set(metrics())


@pytest.mark.parametrize("expression", ALL_EXPRESSIONS)
def test_every_expression_uses_existing_metrics_and_labels(expression: str) -> None:
    known = metrics()
    requested = re.findall(rf"({NAME})(?:\{{(.*?)\}})?", expression)
    assert requested
    for name, selector in requested:
        assert name in known, name
        labels = set(re.findall(r'(\w+)(?:=~|!~|!=|=)"', selector))
        assert labels <= {*known[name], "job"}, f"{name} has no {labels}"
    all_labels = {label for name, _ in requested for label in known[name]}
    for grouped in re.findall(r"by \((.*?)\)", expression):
        assert set(grouped.split(", ")) <= all_labels | {"instance"}, grouped


def test_the_dashboard_shows_every_metric() -> None:
    assert {name for name in families() if not any(name in expression for expression in EXPRESSIONS)} == set()


def test_codes_and_routes_in_expressions_exist() -> None:
    for expression in ALL_EXPRESSIONS:
        for codes in re.findall(r'code=~?"(.*?)"', expression):
            assert set(codes.split("|")) <= set(PROBLEM_TYPES)
        for bound in re.findall(r'_confidence_bucket\{.*?le="(.*?)"', expression):
            assert float(bound) in Metrics().confidence._upper_bounds


def test_panels_have_unique_ids_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    positions = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(positions)) == len(positions)
    assert max(x for x, _ in positions) < 24


def test_the_autoscaler_and_its_adapter_use_an_existing_metric() -> None:
    (patch,) = yaml.safe_load(
        (ROOT / "deploy/kubernetes/components/prometheus/autoscale-on-in-flight-images.yaml").read_text(encoding="utf-8")
    )
    (rule,) = yaml.safe_load((ROOT / "deploy/prometheus/adapter.yaml").read_text(encoding="utf-8"))["rules"]["custom"]
    name = patch["value"]["pods"]["metric"]["name"]
    assert name in metrics()
    assert rule["seriesQuery"].startswith(f"{name}{{")


def test_the_guide_lists_exactly_the_existing_metrics_and_alerts() -> None:
    assert set(re.findall(rf"^\| `({NAME})`", GUIDE, flags=re.MULTILINE)) == families()
    assert set(re.findall(r"^\| `(Classifier\w+)`", GUIDE, flags=re.MULTILINE)) == {rule["alert"] for rule in RULES}
    assert set(re.findall(NAME, GUIDE)) <= families() | set(metrics())
    for stage in STAGES:
        assert f"`{stage}`" in GUIDE


def test_the_documented_backup_contains_all_committed_rows(tmp_path: Path) -> None:
    """Including rows that are only in the write-ahead log, as while a service is running."""
    with contextlib.closing(sqlite3.connect(tmp_path / "reviews.db")) as writing:
        writing.execute("PRAGMA journal_mode = WAL")
        writing.execute("CREATE TABLE decisions (photo TEXT)")
        writing.execute("INSERT INTO decisions VALUES ('a.jpg')")
        writing.commit()
        (command,) = re.findall(r"^(python -c .*VACUUM INTO.*)$", GUIDE, flags=re.MULTILINE)
        arguments = [sys.executable, *shlex.split(command)[1:]]
        subprocess.run(arguments, cwd=tmp_path, check=True)
    with contextlib.closing(sqlite3.connect(tmp_path / "backup.db")) as saved:
        assert saved.execute("SELECT photo FROM decisions").fetchall() == [("a.jpg",)]
