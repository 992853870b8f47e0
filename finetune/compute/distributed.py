"""Distributed training that gives the same weights as a single process (``torchrun``; gloo on CPUs, NCCL on GPUs).

Outside of ``session`` there is one process, and the functions here return their input. Inside, each global batch is divided
among the ranks, each rank computes its part of the gradient of the mean loss, and ``all_reduce`` sums the gradients.
DistributedDataParallel is not used because it averages over ranks, which is incorrect if their parts of the batch differ in
size, and because it does not synchronize the random numbers of dropout.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.compute.device import Compute
from models.errors import ConfigError, DataError, RunError

Item = TypeVar("Item")
Result = TypeVar("Result")
Number = TypeVar("Number", int, float)
TIMEOUT = timedelta(hours=1)  # ranks wait for the slowest one, such as during feature extraction or the export
aten = torch.ops.aten


class PeerLostError(RunError):
    """Another process of this training run has exited or is unreachable."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this is rank 0, which prints and writes the run directory."""
    return rank() == 0


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Join the process group that torchrun started. Only rank 0 prints.

    If a rank fails, the others end as well because their connections to it close. The first rank to fail reports the
    reason; the others exit silently with code 2.

    Raises:
        RunError: The other processes cannot be reached.
    """
    try:
        store, this_rank, count = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=this_rank, world_size=count, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"Could not connect to the other training processes ({reason}). Start all of them with torchrun."
        ) from None
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_rank() % torch.cuda.device_count())
    try:
        with _silenced() if this_rank else contextlib.nullcontext():
            yield
            _communicate(dist.barrier)
    except (Exception, KeyboardInterrupt):
        if _reported_by_another_rank(store):
            raise SystemExit(2) from None
        raise
    dist.destroy_process_group()


def check_supported(compute: Compute, module: nn.Module) -> None:
    """Raise ConfigError if several processes cannot train ``module`` on this device as a single process would."""
    if world_size() == 1:
        return
    if compute.device.type not in ("cpu", "cuda"):
        raise ConfigError(f"Distributed training requires CPUs or CUDA GPUs, not {compute.device.type}. Use --device cpu.")
    if compute.device.type == "cuda" and _local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"There are more processes than GPUs on this machine ({torch.cuda.device_count()}). Use torchrun --nproc-per-node "
            f"{torch.cuda.device_count()}, or --device cpu."
        )
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and any(p.requires_grad for p in layer.parameters()):
            raise ConfigError(
                f"{name.removeprefix('net.')} is a trainable BatchNorm layer, which needs the statistics of the whole batch. "
                "Train in one process, or remove its layer from --unfreeze."
            )


def require_same_on_all_ranks(name: str, value: object) -> None:
    """Raise DataError if ``value``, JSON-compatible data that describes ``name``, differs between ranks."""
    if world_size() == 1:
        return
    hosts, digests = zip(*all_gather((socket.gethostname(), hashlib.sha256(json.dumps(value).encode()).digest())), strict=True)
    for other, (host, digest) in enumerate(zip(hosts, digests, strict=True)):
        if digest != digests[0]:
            raise DataError(
                f"Process {other} on {host} and process 0 on {hosts[0]} have different {name}. Share or copy the same files "
                "to all hosts."
            )


def run_on_main(work: Callable[[], Result]) -> Result:
    """Run ``work`` on rank 0 and return its result on every rank."""
    result: Any = work() if is_main_process() else None
    return broadcast(result)


def broadcast(value: Result) -> Result:
    """Return rank 0's ``value`` on every rank, because different CPUs may compute slightly different values."""
    if world_size() == 1:
        return value
    box = [value]
    _communicate(dist.broadcast_object_list, box, src=0)
    return box[0]


def all_gather(own: Result) -> list[Result]:
    """Return the values of all ranks, in the order of the ranks."""
    if world_size() == 1:
        return [own]
    box: list[Any] = [None] * world_size()
    _communicate(dist.all_gather_object, box, own)
    return box


def local_main_first(work: Callable[[], Result]) -> Result:
    """Run ``work`` on the first rank of each host, then on the others, which find its downloads and files."""
    if world_size() == 1:
        return work()
    result = work() if _local_rank() == 0 else None
    _communicate(dist.barrier)
    return work() if result is None else result


def map_sharded(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]], *, name: Callable[[Item], str]
) -> list[Result]:
    """Divide ``items`` among the ranks and gather the results.

    Args:
        items: The same items on every rank.
        work: Computes one result per item.
        name: A key per item that decides which rank processes it.

    Returns:
        One result per item, in order, on every rank.
    """
    if world_size() == 1:
        return list(work(items))
    owners = _assign_ranks(items, name)
    results = [iter(own) for own in all_gather(list(work(_items_of(rank(), items, owners))))]
    return [next(results[owner]) for owner in owners]


def map_rows_sharded(
    items: Sequence[Item], work: Callable[[Sequence[Item]], NDArray[np.float32]], *, name: Callable[[Item], str]
) -> NDArray[np.float32]:
    """Like ``map_sharded`` for one float32 row per item: (N, ...). Avoids a second copy of all rows in memory."""
    if world_size() == 1:
        return work(items)
    owners = np.array(_assign_ranks(items, name))
    own_items = _items_of(rank(), items, owners)
    own = work(own_items) if own_items else None
    shape = next(shape for shape in all_gather(None if own is None else own.shape[1:]) if shape is not None)
    rows = np.empty((len(items), *shape), np.float32)
    for source in range(world_size()):
        indices = np.flatnonzero(owners == source)
        if len(indices):
            shard = own if source == rank() and own is not None else np.empty((len(indices), *shape), np.float32)
            _communicate(dist.broadcast, torch.from_numpy(shard), src=source)
            rows[indices] = shard
    return rows


def shard_slice(count: int) -> slice:
    """Return this rank's slice of ``count`` rows. The sizes of the slices differ by at most one."""
    return slice(rank() * count // world_size(), (rank() + 1) * count // world_size())


def all_reduce_sum(value: Number) -> Number:
    """Return the sum of all ranks' values."""
    if world_size() == 1:
        return value
    box = torch.tensor(value, dtype=torch.float64)
    _communicate(dist.all_reduce, box)
    return type(value)(box.item())


def broadcast_weights(module: nn.Module) -> None:
    """Copy rank 0's weights to every rank."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            _communicate(dist.broadcast, tensor, src=0)


def all_reduce_gradients(module: nn.Module) -> None:
    """Sum the gradients over the ranks. Ranks without a part of the batch have no gradients and contribute zeros."""
    if world_size() == 1:
        return
    trainable = [p for p in module.parameters() if p.requires_grad]
    for parameter in trainable:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    pending = [_communicate(dist.all_reduce, parameter.grad, async_op=True) for parameter in trainable]
    for work in pending:
        _communicate(work.wait)


def shared_dropout(count: int) -> contextlib.AbstractContextManager[object]:
    """Make dropout in a forward pass independent of the number of ranks.

    Inside the context, each rank draws the random numbers for all ``count`` images of the global batch and uses those of its
    own slice. As all ranks have the same seed, CPU training drops exactly what a single process would. On GPUs a single
    process draws random numbers differently, so results are equal only between runs with several ranks.
    """
    return contextlib.nullcontext() if world_size() == 1 else _SharedDropout(count)


class _SharedDropout(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Intercepts the two torch operations behind all kinds of dropout, alpha dropout and stochastic depth."""

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count, self._slice = count, shard_slice(count)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _drops_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        if func is aten.bernoulli_.float:
            return args[0].copy_(self._draw(args[0], *args[1:], **kwargs))
        if func is aten.native_dropout.default:
            values, probability = args[:2]
            mask = self._draw(values, 1 - probability)
            return values * mask / (1 - probability), mask.bool()
        raise RunError(f"Distributed training does not support the random operation {func} of this network. Use one process.")

    def _draw(self, like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(like) != self._slice.stop - self._slice.start:
            raise RunError("Distributed training does not support random numbers shared between images. Use one process.")
        return like.new_empty((self._count, *like.shape[1:])).bernoulli_(*args, **kwargs)[self._slice]


def _drops_nothing(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether this is attention without dropout, which torch marks as random regardless."""
    names = [argument.name for argument in func._schema.arguments]
    params = dict(zip(names, args, strict=False)) | kwargs
    return "dropout_p" in names and not params.get("dropout_p")


def _assign_ranks(items: Sequence[Item], name: Callable[[Item], str]) -> list[int]:
    """Return the rank of each item by a hash of its name, so that one rank both decodes and processes an image."""
    digests = (hashlib.sha256(name(item).encode("utf-8", "surrogateescape")).digest() for item in items)
    return [int.from_bytes(digest[:8], "big") % world_size() for digest in digests]


def _items_of(owning_rank: int, items: Sequence[Item], owners: Sequence[int] | NDArray[np.int_]) -> list[Item]:
    return [item for item, owner in zip(items, owners, strict=True) if owner == owning_rank]


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _communicate(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a collective operation. Raises PeerLostError if a connection closes."""
    try:
        return operation(*args, **kwargs)
    except RuntimeError as error:  # raised by gloo and NCCL
        raise PeerLostError(
            "Another training process has exited or is unreachable. Fix the cause, then re-run the same command with --resume. "
            f"({' '.join(str(error).split())[:200]})"
        ) from None


def _reported_by_another_rank(store: Store) -> bool:
    """Return whether another rank failed before this one.

    Waits until that rank has printed its error, because torchrun ends all processes as soon as the first one exits.
    """
    try:
        if store.add("finetune/failed", 1) == 1:
            atexit.register(_suppress_errors, _announce_report, store)
            return False
        _suppress_errors(store.wait, ["finetune/reported"], timedelta(seconds=10))
    except RuntimeError:  # the host of the store is gone
        return False
    return True


def _announce_report(store: Store) -> None:
    """Let the other ranks end, and give them time to ask: the store ends together with the process that hosts it."""
    store.set("finetune/reported", "")
    until = time.monotonic() + 3.0
    while store.add("finetune/failed", 0) < int(os.environ["WORLD_SIZE"]) and time.monotonic() < until:
        time.sleep(0.02)


def _suppress_errors(operation: Callable[..., Any], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):
        operation(*args)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    with (
        open(os.devnull, "w", encoding="utf-8") as devnull,
        contextlib.redirect_stdout(devnull),
        contextlib.redirect_stderr(devnull),
    ):
        yield
