"""Distributed training with torchrun: same weights as one process, one writer, joint failure."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.ops import StochasticDepth

from finetune.compute import distributed
from tests.helpers.databases import free_port
from tests.helpers.server import poll
from tests.helpers.tiny_network import CHILD_TIMEOUT_S, ROOT, FinetuneProcess, color_folder, finetune, start_finetune

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # of a weight; float32 sums depend on their order
TRAIN = ("-m", "tests.helpers.tiny_network", "train")


def environment(rank: int, count: int, *, address: str = "127.0.0.1", port: int, **more: str) -> dict[str, str]:
    """Return the variables that torchrun sets for a process."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return ranks | {"MASTER_ADDR": address, "MASTER_PORT": str(port)} | more


@contextlib.contextmanager
def started_ranks(count: int, *words: object, **more: str) -> Iterator[list[FinetuneProcess]]:
    """Start ``finetune train`` in ``count`` processes that communicate, as torchrun does. They are killed at the end."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(start_finetune("train", *words, **environment(rank, count, port=port, **more)))
            for rank in range(count)
        ]


def train_in_ranks(count: int, *words: object) -> tuple[list[int], str, str]:
    """Run ``finetune train`` in ``count`` processes. Returns their exit codes, standard outputs and standard errors."""
    with started_ranks(count, *words) as ranks:
        codes, outs, errs = zip(*(child.wait() for child in ranks), strict=True)
    return list(codes), "".join(outs), "".join(errs)


def torchrun(count: int, *words: object) -> tuple[int, str, str]:
    """Run ``finetune train`` under torchrun. Returns its exit code, standard output and standard error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, *TRAIN, *words]
    settings = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [str(word) for word in command], env=os.environ | settings, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S
    )
    return done.returncode, done.stdout, done.stderr


def flags(data: Path, weights: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("--data-dir", data, "--backbone", "tiny", "--weights", weights, "--epochs", 3, "--output-dir", out, *more)


def largest_difference(run: Path, other: Path) -> float:
    ours, theirs = (load_file(folder / "bundle" / "model.safetensors") for folder in (run, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 photos in batches of 5: the last batch has 2, so that two of four ranks get none."""
    return color_folder(tmp_path_factory.mktemp("data") / "colours", train=11, valid=5)


@pytest.fixture(scope="module")
def unequal(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 photos of one class and 3 of the other."""
    root = tmp_path_factory.mktemp("unequal") / "colours"
    shutil.copytree(data, root)
    for photo in sorted((root / "train" / "red").iterdir())[3:]:
        photo.unlink()
    return root


@pytest.fixture(scope="module")
def alone(data: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    code, _, message = finetune("train", *flags(data, tiny_weights, out))
    assert (code, message) == (0, "")
    return out


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.heavy)])
def test_several_processes_give_the_weights_of_one(
    count: int, data: Path, tiny_weights: Path, alone: Path, tmp_path: Path
) -> None:
    """With dropout before the head, an uneven last batch, and features computed by one rank per photo."""
    words = flags(data, tiny_weights, tmp_path / "run", "--cache-dir", tmp_path / "cache")
    codes, out, err = train_in_ranks(count, *words)
    assert codes == [0] * count, err
    assert out.count("Best epoch: ") == out.count("bundle       ") == 1
    assert largest_difference(tmp_path / "run", alone) < TOLERANCE


@pytest.mark.parametrize(
    "more",
    [
        ("--class-weights", '{"blue": 1, "red": 4}', "--sampling", "balanced"),
        pytest.param(("--class-weights", "balanced", "--augment"), marks=pytest.mark.heavy),
    ],
    ids=["cached", "augmented"],
)
def test_class_weights_and_sampling_give_the_weights_of_one_process(
    more: tuple[str, ...], unequal: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    """A plain head is trained for comparison as well, by all processes."""
    code, _, message = finetune("train", *flags(unequal, tiny_weights, tmp_path / "one", *more))
    assert (code, message) == (0, "")
    code, _, err = torchrun(2, *flags(unequal, tiny_weights, tmp_path / "two", *more))
    assert code == 0, err
    assert largest_difference(tmp_path / "two", tmp_path / "one") < TOLERANCE


@pytest.mark.heavy
def test_training_without_cached_features_gives_the_same_weights(data: Path, tiny_weights: Path, tmp_path: Path) -> None:
    more = ("--augment", "--unfreeze", "classifier.3", "--optimizer", "adam", "--lr", 0.005)
    code, _, message = finetune("train", *flags(data, tiny_weights, tmp_path / "one", *more))
    assert (code, message) == (0, "")
    codes, _, err = train_in_ranks(2, *flags(data, tiny_weights, tmp_path / "two", *more))
    assert codes == [0, 0], err
    assert largest_difference(tmp_path / "two", tmp_path / "one") < 10 * TOLERANCE  # Adam divides by small numbers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data-dir": "no-such-folder"}, "No such folder: no-such-folder"),
        ({"--lr": "-1"}, "--lr must be at least 0 (got -1.0)."),
        ({"--unfreeze": "features.4"}, "features.4 is a trainable BatchNorm layer"),
    ],
)
def test_an_error_on_all_ranks_is_printed_once(
    change: dict[str, str], message: str, data: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    more = [word for pair in change.items() for word in pair]
    codes, _, err = train_in_ranks(2, *flags(data, tiny_weights, tmp_path / "run", *more))
    assert codes == [2, 2]
    assert err.count(message) == 1, err
    assert not (tmp_path / "run").exists()


def test_torchrun_prints_an_error_on_all_ranks_once(data: Path, tiny_weights: Path, tmp_path: Path) -> None:
    """torchrun ends all processes as soon as the first one exits, which must have printed the error by then."""
    code, _, err = torchrun(2, *flags(data, tiny_weights, tmp_path / "run", "--lr", "-1"))
    assert code != 0
    assert err.count("--lr must be at least 0 (got -1.0).") == 1, err


def test_an_error_on_rank_0_ends_the_others(data: Path, tiny_weights: Path, tmp_path: Path) -> None:
    """Only rank 0 checks the run directory, which another run occupies."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    codes, _, err = train_in_ranks(2, *flags(data, tiny_weights, tmp_path / "run"))
    assert codes == [2, 2]
    assert err.count("already contains a run") == 1
    assert "Traceback" not in err


@pytest.mark.heavy
def test_a_killed_process_loses_no_finished_epoch(data: Path, tiny_weights: Path, tmp_path: Path) -> None:
    more = ("--epochs", 60, "--lr-schedule", "cosine")
    code, _, message = finetune("train", *flags(data, tiny_weights, tmp_path / "whole", *more))
    assert (code, message) == (0, "")
    run = tmp_path / "run"
    with started_ranks(2, *flags(data, tiny_weights, run, *more), HOLD_AT="30") as (first, second):
        poll(lambda: not first.is_running() or epochs(run) >= 3, within_s=CHILD_TIMEOUT_S, every_s=0.005)
        second.kill()
        first.kill(signal.SIGTERM)  # as torchrun does when a process ends
        code, _, err = first.wait()
    killed = epochs(run)
    assert code in (2, -signal.SIGTERM), err
    assert 3 <= killed < 60, err
    codes, out, err = train_in_ranks(2, "--resume", "--output-dir", run)
    assert codes == [0, 0], err
    assert f"Resuming after epoch {killed}" in out or f"Resuming after epoch {killed + 1}" in out  # between two files
    assert largest_difference(run, tmp_path / "whole") < TOLERANCE


def epochs(run: Path) -> int:
    file = run / "history.csv"
    return len(file.read_text().splitlines()) - 1 if file.is_file() else 0


# Two hosts


@pytest.fixture
def two_hosts() -> Iterator[list[list[str]]]:
    """Create two connected network namespaces; yield the command prefix that runs a program in each of them."""
    if shutil.which("ip") is None:
        pytest.skip("the `ip` command (Debian package iproute2) is required to create network namespaces")
    names = [f"finetune-{os.getpid()}-{i}" for i in range(2)]
    ends = [f"ft{os.getpid() % 100_000}-{i}" for i in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no permission to create network namespaces: {error.stderr.strip()}")
        for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", "veth")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "veth")
            ip("-n", name, "link", "set", "veth", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_hosts_without_a_shared_file_system(
    two_hosts: list[list[str]], data: Path, tiny_weights: Path, alone: Path, tmp_path: Path
) -> None:
    """Each host has its own copy of the photos and its own cache. Only the first writes a run directory."""
    processes = []
    try:
        for number, prefix in enumerate(two_hosts):
            home = tmp_path / f"host{number}"
            shutil.copytree(data, home / "photos")
            shutil.copy(tiny_weights, home / "tiny.pth")
            words = flags(home / "photos", home / "tiny.pth", home / "run", "--cache-dir", home / "cache")
            variables = environment(
                number, 2, address="10.77.0.1", port=29517, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GLOO_SOCKET_IFNAME="veth"
            )
            command = [*prefix, sys.executable, *TRAIN, *map(str, words)]
            settings = os.environ | {"PYTHONPATH": str(ROOT)} | variables
            processes.append(subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True))
        for process in processes:
            _, err = process.communicate(timeout=CHILD_TIMEOUT_S)
            assert process.returncode == 0, err
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert largest_difference(tmp_path / "host0" / "run", alone) < TOLERANCE
    assert not (tmp_path / "host1" / "run").exists()
    assert list((tmp_path / "host1" / "cache").rglob("*.safetensors"))


# Dropout


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(0.3), StochasticDepth(0.4, "row"), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(144, 32), nn.AlphaDropout(0.2), nn.Dropout(0.5), nn.Linear(32, 2))

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        return self.head(self.maps(photos))


def as_rank(monkeypatch: pytest.MonkeyPatch, number: int, count: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: number)
    monkeypatch.setattr(distributed, "world_size", lambda: count)


@pytest.mark.parametrize("count", [2, 3])
def test_all_kinds_of_dropout_equal_those_of_one_process(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, photos = Block().train(), torch.randn(7, 3, 8, 8)
    torch.manual_seed(1)
    expected = [network(photos) for _ in range(2)]  # the second batch continues the random stream
    slices: list[list[torch.Tensor]] = [[], []]
    for number in range(count):
        as_rank(monkeypatch, number, count)
        torch.manual_seed(1)
        for step in range(2):
            with distributed.shared_dropout(7):
                slices[step].append(network(photos[distributed.shard_slice(7)]))
    for step in range(2):
        torch.testing.assert_close(torch.cat(slices[step]), expected[step])


def test_native_dropout_is_shared_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs use native_dropout. Every rank applies its rows of one mask, and gradients pass through the same elements."""
    ones = torch.ones(6, 50)
    parts = []
    for number in range(2):
        as_rank(monkeypatch, number, 2)
        torch.manual_seed(1)
        own = ones[distributed.shard_slice(6)].clone().requires_grad_()
        with distributed.shared_dropout(6):
            dropped, kept = torch.native_dropout(own, 0.25, True)
        dropped.sum().backward()
        assert own.grad is not None
        torch.testing.assert_close(own.grad, kept / 0.75)
        torch.testing.assert_close(dropped.detach(), kept / 0.75)
        parts.append(kept)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.cat(parts), torch.empty(6, 50).bernoulli_(0.75).bool())


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda x: x + torch.randn(x.shape), "does not support the random operation aten.randn"),
        (lambda x: x * torch.empty(9).bernoulli_(0.5).sum(), "does not support random numbers shared between images"),
    ],
)
def test_other_random_numbers_are_rejected(draw: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, 2)
    with distributed.shared_dropout(6), pytest.raises(distributed.RunError, match=message):
        draw(torch.ones(3, 2))


def test_slices_cover_the_batch_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    for total in range(12):
        parts = []
        for number in range(4):
            as_rank(monkeypatch, number, 4)
            parts.append(list(range(total))[distributed.shard_slice(total)])
        assert [index for part in parts for index in part] == list(range(total))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
