"""The dashboard, the alerts and the operator's guide speak of the metrics that there are, and the guide of every one."""

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
ALL = [*EXPRESSIONS, *(rule["expr"] for rule in RULES)]


def metrics() -> dict[str, tuple[str, ...]]:
    """The name of every series that can be asked for -> its labels."""
    found = {}
    for metric in vars(Metrics()).values():
        if not hasattr(metric, "_labelnames"):
            continue
        labels = tuple(metric._labelnames)
        (family,) = metric.describe()
        if isinstance(metric, Histogram):
            found |= {f"{family.name}_bucket": (*labels, "le"), f"{family.name}_sum": labels, f"{family.name}_count": labels}
        else:
            found[family.name + ("_total" if family.type == "counter" else "")] = labels
    return found


def families() -> set[str]:
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in metrics()}


def test_the_series_named_here_are_those_that_are_scraped() -> None:
    """``metrics()`` looks into prometheus_client; what the service really says is the judge of it."""
    told = Metrics()
    told.requests.labels("/predict", "POST", "200").inc()
    told.request_duration.labels("/predict").observe(1)
    scraped = {line.split("{")[0].split(" ")[0] for line in told.render().decode().splitlines() if not line.startswith("#")}
    assert {name for name in scraped if not name.endswith("_created")} <= set(metrics())
    assert {"http_requests_total", "http_request_duration_seconds_sum", "classifier_ready_workers"} <= set(metrics())


@pytest.mark.parametrize("expression", ALL)
def test_an_expression_asks_for_what_there_is(expression: str) -> None:
    known = metrics()
    asked = re.findall(rf"({NAME})(?:\{{(.*?)\}})?", expression)
    assert asked
    for name, selector in asked:
        assert name in known, name
        labels = set(re.findall(r'(\w+)(?:=~|!~|!=|=)"', selector))
        assert labels <= {*known[name], "job"}, f"{name} has no {labels}"
    of_all = {label for name, _ in asked for label in known[name]}
    for grouped in re.findall(r"by \((.*?)\)", expression):
        assert set(grouped.split(", ")) <= of_all | {"instance"}, grouped


def test_the_dashboard_shows_every_metric() -> None:
    assert {name for name in families() if not any(name in expression for expression in EXPRESSIONS)} == set()


def test_codes_and_routes_in_expressions_exist() -> None:
    for expression in ALL:
        for codes in re.findall(r'code=~?"(.*?)"', expression):
            assert set(codes.split("|")) <= set(PROBLEM_TYPES)
        for bound in re.findall(r'_confidence_bucket\{.*?le="(.*?)"', expression):
            assert float(bound) in Metrics().confidence._upper_bounds


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_the_autoscaler_and_its_adapter_ask_for_a_metric_that_there_is() -> None:
    (patch,) = yaml.safe_load(
        (ROOT / "deploy/kubernetes/components/prometheus/autoscale-on-in-flight-images.yaml").read_text(encoding="utf-8")
    )
    (rule,) = yaml.safe_load((ROOT / "deploy/prometheus/adapter.yaml").read_text(encoding="utf-8"))["rules"]["custom"]
    name = patch["value"]["pods"]["metric"]["name"]
    assert name in metrics()
    assert rule["seriesQuery"].startswith(f"{name}{{")


def test_the_guide_has_a_row_for_every_metric_and_every_alert_and_for_no_other() -> None:
    assert set(re.findall(rf"^\| `({NAME})`", GUIDE, flags=re.MULTILINE)) == families()
    assert set(re.findall(r"^\| `(Classifier\w+)`", GUIDE, flags=re.MULTILINE)) == {rule["alert"] for rule in RULES}
    assert set(re.findall(NAME, GUIDE)) <= families() | set(metrics())
    for stage in STAGES:
        assert f"`{stage}`" in GUIDE


def test_the_backup_that_the_guide_says_holds_what_was_committed(tmp_path: Path) -> None:
    """Also what is not in the database's file yet, as where a service still writes."""
    with contextlib.closing(sqlite3.connect(tmp_path / "reviews.db")) as writing:
        writing.execute("PRAGMA journal_mode = WAL")
        writing.execute("CREATE TABLE decisions (photo TEXT)")
        writing.execute("INSERT INTO decisions VALUES ('a.jpg')")
        writing.commit()
        (command,) = re.findall(r"^(python -c .*VACUUM INTO.*)$", GUIDE, flags=re.MULTILINE)
        words = [sys.executable, *shlex.split(command)[1:]]
        subprocess.run(words, cwd=tmp_path, check=True)
    with contextlib.closing(sqlite3.connect(tmp_path / "backup.db")) as saved:
        assert saved.execute("SELECT photo FROM decisions").fetchall() == [("a.jpg",)]
