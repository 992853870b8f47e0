"""The manifests are what Kubernetes knows, and agree with one another, with the image and with the service's settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.30", kubernetes_validate.latest_version())
FOLDERS = sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml"))
SETTINGS = {row.name.upper() for row in dataclasses.fields(Settings)}
NAME = {"app.kubernetes.io/name": "dogs-vs-cats"}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def kustomization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = load(folder / "kustomization.yaml")
    return found


def of_kind(kind: str) -> dict[str, Any]:
    """The one manifest of this kind in the base."""
    (found,) = [body for path in (KUBERNETES / "base").glob("*.yaml") if (body := load(path))["kind"] == kind]
    return dict(found)


def pod() -> dict[str, Any]:
    return dict(of_kind("Deployment")["spec"]["template"]["spec"])


def container() -> dict[str, Any]:
    (found,) = pod()["containers"]
    return dict(found)


def config(folder: str) -> dict[str, str]:
    """What the settings' ConfigMap of a folder holds."""
    (found,) = kustomization(KUBERNETES / folder)["configMapGenerator"]
    return dict(row.split("=", 1) for row in found["literals"])


def variables(env: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in env:
        yield row["name"], row


@pytest.mark.parametrize("version", VERSIONS)
def test_every_resource_is_one_that_kubernetes_knows(version: str) -> None:
    checked = set()
    for folder in FOLDERS:
        for name in kustomization(folder)["resources"]:
            body = load(folder / name) if name.endswith(".yaml") else None
            if body and body["apiVersion"] != "monitoring.coreos.com/v1":  # the operator's, which has no schema here
                kubernetes_validate.validate(body, version, strict=True)
                checked.add(body["kind"])
    assert {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"} <= checked


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_kustomization_lists_every_file_beside_it_and_no_other(folder: Path) -> None:
    body = kustomization(folder)
    patches = [row["path"] for row in body.get("patches", [])]
    files = [name for name in body["resources"] if name.endswith(".yaml")] + patches
    assert sorted(files) == sorted({path.name for path in folder.glob("*")} - {"kustomization.yaml"})
    for other in [*body["resources"], *body.get("components", [])]:
        assert (folder / other).exists(), other


def test_every_variable_is_a_setting_with_a_value_that_the_service_takes() -> None:
    overlay = load(KUBERNETES / "overlays" / "production" / "deployment.yaml")
    (patched,) = overlay["spec"]["template"]["spec"]["containers"]
    named = dict(variables(container()["env"])) | dict(variables(patched["env"]))
    given = config("base") | config("overlays/production")
    given |= {name: row["value"] for name, row in named.items() if "value" in row}
    assert set(given) | set(named) <= SETTINGS
    Settings.from_environment(given)


def test_without_a_limit_the_service_plans_for_the_processors_that_it_asks_for() -> None:
    wanted = container()["resources"]
    assert config("base")["CPUS"] == wanted["requests"]["cpu"]
    assert "cpu" not in wanted["limits"]


def test_a_pod_has_time_to_finish_what_it_accepted() -> None:
    command = container()["lifecycle"]["preStop"]["exec"]["command"]
    pause_s = int(command[-1])
    assert pod()["terminationGracePeriodSeconds"] > pause_s + int(config("base")["SHUTDOWN_TIMEOUT_S"])


def test_the_probes_ask_what_the_service_answers() -> None:
    routes = set(re.findall(r'@bp\.get\("(.*?)"\)', (ROOT / "service" / "api" / "health.py").read_text(encoding="utf-8")))
    asked = {name: container()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {row["path"] for row in asked.values()} <= routes
    assert asked["liveness"]["path"] == "/health/live"
    assert asked["readiness"]["path"] == asked["startup"]["path"] == "/health/ready"
    monitor = load(KUBERNETES / "components" / "prometheus" / "service-monitor.yaml")
    assert monitor["spec"]["endpoints"][0]["path"] in routes


def test_ports_agree_from_the_image_to_the_monitor() -> None:
    (port,) = container()["ports"]
    assert port == {"name": "http", "containerPort": Settings().port}
    assert {container()[f"{name}Probe"]["httpGet"]["port"] for name in ("startup", "readiness", "liveness")} == {"http"}
    (outside,) = of_kind("Service")["spec"]["ports"]
    assert (outside["name"], outside["targetPort"]) == ("http", "http")
    (rule,) = of_kind("NetworkPolicy")["spec"]["ingress"]
    assert [row["port"] for row in rule["ports"]] == ["http"]
    monitor = load(KUBERNETES / "components" / "prometheus" / "service-monitor.yaml")
    assert [row["port"] for row in monitor["spec"]["endpoints"]] == ["http"]


def test_every_selector_finds_the_pods() -> None:
    labels = of_kind("Deployment")["spec"]["template"]["metadata"]["labels"]
    monitor = load(KUBERNETES / "components" / "prometheus" / "service-monitor.yaml")
    selectors = [
        of_kind("Deployment")["spec"]["selector"]["matchLabels"],
        of_kind("Service")["spec"]["selector"],
        of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        of_kind("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(row["labelSelector"]["matchLabels"] for row in pod()["topologySpreadConstraints"]),
    ]
    assert labels == NAME
    assert all(selector == NAME for selector in selectors)
    assert monitor["spec"]["selector"]["matchLabels"] == of_kind("Service")["metadata"]["labels"]


def test_the_autoscaler_scales_the_deployment_which_leaves_it_the_number() -> None:
    target = of_kind("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", of_kind("Deployment")["metadata"]["name"])
    assert "replicas" not in of_kind("Deployment")["spec"]
    assert of_kind("HorizontalPodAutoscaler")["spec"]["minReplicas"] > of_kind("PodDisruptionBudget")["spec"]["maxUnavailable"]


def test_a_pod_may_next_to_nothing() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    security = pod()["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}\n" in dockerfile
    assert security["runAsNonRoot"] is True
    inner = container()["securityContext"]
    assert inner["readOnlyRootFilesystem"] is True
    assert inner["allowPrivilegeEscalation"] is False
    assert inner["capabilities"]["drop"] == ["ALL"]
    assert pod()["automountServiceAccountToken"] is False


def test_what_is_mounted_is_a_volume_and_what_is_written_is_mounted() -> None:
    mounted = {row["name"]: row["mountPath"] for row in container()["volumeMounts"]}
    assert set(mounted) == {row["name"] for row in pod()["volumes"]}
    assert {"/tmp", "/cache"} == set(mounted.values())


def test_in_production_no_pod_starts_without_keys() -> None:
    overlay = load(KUBERNETES / "overlays" / "production" / "deployment.yaml")
    (patched,) = overlay["spec"]["template"]["spec"]["containers"]
    keys = dict(variables(patched["env"]))["API_KEYS"]["valueFrom"]["secretKeyRef"]
    assert keys["optional"] is False
    assert keys["name"] == dict(variables(container()["env"]))["API_KEYS"]["valueFrom"]["secretKeyRef"]["name"]
    assert f"create secret generic {keys['name']} --from-literal=API_KEYS=" in (
        KUBERNETES / "overlays" / "production" / "kustomization.yaml"
    ).read_text(encoding="utf-8")
