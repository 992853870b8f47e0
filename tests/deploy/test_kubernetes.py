"""The manifests are valid, and agree with each other, with the image and with the settings of the service."""

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
    manifest: dict[str, Any] = load(folder / "kustomization.yaml")
    return manifest


def of_kind(kind: str) -> dict[str, Any]:
    """Load the only manifest of this kind in the base."""
    (manifest,) = [body for path in (KUBERNETES / "base").glob("*.yaml") if (body := load(path))["kind"] == kind]
    return dict(manifest)


def pod() -> dict[str, Any]:
    return dict(of_kind("Deployment")["spec"]["template"]["spec"])


def container() -> dict[str, Any]:
    (manifest,) = pod()["containers"]
    return dict(manifest)


def config(folder: str) -> dict[str, str]:
    """Return the settings in the ConfigMap of a folder."""
    (manifest,) = kustomization(KUBERNETES / folder)["configMapGenerator"]
    return dict(row.split("=", 1) for row in manifest["literals"])


def variables(env: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in env:
        yield row["name"], row


@pytest.mark.parametrize("version", VERSIONS)
def test_every_resource_is_valid(version: str) -> None:
    checked = set()
    for folder in FOLDERS:
        for name in kustomization(folder)["resources"]:
            body = load(folder / name) if name.endswith(".yaml") else None
            if body and body["apiVersion"] != "monitoring.coreos.com/v1":  # a custom resource without a schema here
                kubernetes_validate.validate(body, version, strict=True)
                checked.add(body["kind"])
    assert {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"} <= checked


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_kustomization_lists_every_file_of_its_folder(folder: Path) -> None:
    body = kustomization(folder)
    patches = [row["path"] for row in body.get("patches", [])]
    files = [name for name in body["resources"] if name.endswith(".yaml")] + patches
    assert sorted(files) == sorted({path.name for path in folder.glob("*")} - {"kustomization.yaml"})
    for other in [*body["resources"], *body.get("components", [])]:
        assert (folder / other).exists(), other


def test_every_variable_is_a_setting_with_a_valid_value() -> None:
    overlay = load(KUBERNETES / "overlays" / "production" / "deployment.yaml")
    (patched,) = overlay["spec"]["template"]["spec"]["containers"]
    names = dict(variables(container()["env"])) | dict(variables(patched["env"]))
    settings = config("base") | config("overlays/production")
    settings |= {name: row["value"] for name, row in names.items() if "value" in row}
    assert set(settings) | set(names) <= SETTINGS
    Settings.from_environment(settings)


def test_without_a_cpu_limit_the_service_uses_the_requested_cpus() -> None:
    resources = container()["resources"]
    assert config("base")["CPUS"] == resources["requests"]["cpu"]
    assert "cpu" not in resources["limits"]


def test_a_pod_has_time_to_finish_accepted_requests() -> None:
    command = container()["lifecycle"]["preStop"]["exec"]["command"]
    pause_s = int(command[-1])
    assert pod()["terminationGracePeriodSeconds"] > pause_s + int(config("base")["SHUTDOWN_TIMEOUT_S"])


def test_the_probes_request_existing_routes() -> None:
    routes = set(re.findall(r'@bp\.get\("(.*?)"\)', (ROOT / "service" / "api" / "health.py").read_text(encoding="utf-8")))
    probes = {name: container()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {row["path"] for row in probes.values()} <= routes
    assert probes["liveness"]["path"] == "/health/live"
    assert probes["readiness"]["path"] == probes["startup"]["path"] == "/health/ready"
    monitor = load(KUBERNETES / "components" / "prometheus" / "service-monitor.yaml")
    assert monitor["spec"]["endpoints"][0]["path"] in routes


def test_ports_agree() -> None:
    (port,) = container()["ports"]
    assert port == {"name": "http", "containerPort": Settings().port}
    assert {container()[f"{name}Probe"]["httpGet"]["port"] for name in ("startup", "readiness", "liveness")} == {"http"}
    (outside,) = of_kind("Service")["spec"]["ports"]
    assert (outside["name"], outside["targetPort"]) == ("http", "http")
    (rule,) = of_kind("NetworkPolicy")["spec"]["ingress"]
    assert [row["port"] for row in rule["ports"]] == ["http"]
    monitor = load(KUBERNETES / "components" / "prometheus" / "service-monitor.yaml")
    assert [row["port"] for row in monitor["spec"]["endpoints"]] == ["http"]


def test_every_selector_matches_the_pods() -> None:
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


def test_the_autoscaler_scales_the_deployment_which_sets_no_replicas() -> None:
    target = of_kind("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", of_kind("Deployment")["metadata"]["name"])
    assert "replicas" not in of_kind("Deployment")["spec"]
    assert of_kind("HorizontalPodAutoscaler")["spec"]["minReplicas"] > of_kind("PodDisruptionBudget")["spec"]["maxUnavailable"]


def test_a_pod_has_minimal_permissions() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    security = pod()["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}\n" in dockerfile
    assert security["runAsNonRoot"] is True
    inner = container()["securityContext"]
    assert inner["readOnlyRootFilesystem"] is True
    assert inner["allowPrivilegeEscalation"] is False
    assert inner["capabilities"]["drop"] == ["ALL"]
    assert pod()["automountServiceAccountToken"] is False


def test_every_mount_is_a_volume_and_writable_folders_are_mounted() -> None:
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
