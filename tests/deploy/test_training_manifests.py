"""The Kubernetes examples for training and batch prediction: valid pods and commands."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import validate

from finetune.cli import predict, train

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "training"
VERSION = "1.32"


def read(name: str) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return manifest


def arguments_of(command: str) -> list[str]:
    """Return the arguments after ``finetune COMMAND``."""
    return re.sub(r"\$\(.*?\)", " ", command).split("finetune ")[-1].split()[1:]


def test_the_scoring_job_and_its_command_are_valid() -> None:
    job = read("score-job.yaml")
    validate(job, VERSION, strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    args = parser.parse_args(container["args"][1:])
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(args.bundle), str(args.list.parent), str(args.output.parent)} <= mounts
    sizes = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert sizes["WORLD_SIZE"] == str(job["spec"]["completions"])


@pytest.mark.parametrize("kind", ["Master", "Worker"])
def test_the_pods_of_the_training_job_are_valid(kind: str) -> None:
    """Kubernetes has no schema for a PyTorchJob, but for its pods."""
    template = read("pytorchjob.yaml")["spec"]["pytorchReplicaSpecs"][kind]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}, "spec": template["spec"]}
    validate(pod, VERSION, strict=True)
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    (container,) = template["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_training_starts_the_declared_number_of_processes() -> None:
    job = read("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    (command,) = container["args"]
    assert f"--nnodes {sum(replica['replicas'] for replica in replicas.values())} " in command
    assert f"--nproc-per-node {job['spec']['nprocPerNode']} " in command
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(arguments_of(command))
    assert f"{args.output_dir}/config.yaml" in command
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(args.data_dir), str(args.output_dir.parent), str(args.cache_dir)} <= mounts


def test_the_job_that_trains_on_one_host_is_valid_and_resumes() -> None:
    job = read("train-job.yaml")
    validate(job, VERSION, strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (command,) = container["args"]
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(arguments_of(command))
    assert f"test -e {args.output_dir}/config.yaml && echo --resume" in command
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for path in (args.data_dir, args.output_dir, args.cache_dir, args.progress_file):
        assert any(path.is_relative_to(mount) for mount in mounts)
