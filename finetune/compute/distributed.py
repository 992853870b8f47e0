"""Several processes train as one: all that is distributed, on PyTorch's own engine (``torchrun``; gloo on CPUs, NCCL on GPUs).

Outside of ``session`` the world is of one process, and every function here gives what it was given. Inside, a *rank* is one
of ``world_size()`` processes. Each global batch is divided over the ranks, each computes the gradients of its share of the
loss's mean, and their sum is taken by ``all_reduce``. DistributedDataParallel is not used: it averages over ranks, which is
another thing where shares are uneven or empty, and it knows nothing of the random numbers of dropout.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import socket
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
TIMEOUT = timedelta(hours=1)  # how long a rank waits for another that is alive: for its share of the photos, or the export
aten = torch.ops.aten


class PeerLostError(RunError):
    """Another process of this training is no longer there."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is the one rank that prints and writes the run."""
    return rank() == 0


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Meet the other ranks that torchrun started; the first alone prints.

    Where one fails, the others end too, as their connections to it close: the first to fail says why, the others exit with 2
    and say nothing.
    """
    try:
        store, number, count = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"The other processes of this training were not met ({reason}); start them all with torchrun.") from None
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_rank() % torch.cuda.device_count())
    try:
        with _silenced() if number else contextlib.nullcontext():
            yield
            _talk(dist.barrier)
    except (Exception, KeyboardInterrupt):
        if _another_said_why(store):
            raise SystemExit(2) from None
        raise
    dist.destroy_process_group()


def check_supported(compute: Compute, part: nn.Module) -> None:
    """Raise ConfigError for a device or a network that several processes cannot train as one would."""
    if world_size() == 1:
        return
    if compute.device.type not in ("cpu", "cuda"):
        raise ConfigError(f"Several processes train on CPUs or on CUDA's GPUs, not on {compute.device.type}; say --device cpu.")
    if compute.device.type == "cuda" and _local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"This machine has {torch.cuda.device_count()} GPUs, and process {_local_rank() + 1} was started on it; say "
            f"torchrun --nproc-per-node {torch.cuda.device_count()}, or --device cpu."
        )
    for name, layer in part.named_modules():
        if isinstance(layer, _BatchNorm) and any(p.requires_grad for p in layer.parameters()):
            raise ConfigError(
                f"{name.removeprefix('net.')} is BatchNorm that learns: its mean is over a whole batch, and each process has a "
                "share of it only; train this in one process, or leave its layer out of --unfreeze."
            )


def require_same_on_all_ranks(what: str, value: object) -> None:
    """Raise DataError where ``value``, plain data that describes ``what``, is not the same on every rank."""
    if world_size() == 1:
        return
    hosts, digests = zip(*all_gather((socket.gethostname(), hashlib.sha256(json.dumps(value).encode()).digest())), strict=True)
    for other, (host, digest) in enumerate(zip(hosts, digests, strict=True)):
        if digest != digests[0]:
            raise DataError(
                f"Process {other} on {host} has other {what} than process 0 on {hosts[0]}; give every host the same, "
                "shared or copied."
            )


def run_on_main(work: Callable[[], Result]) -> Result:
    """Let the first rank do ``work``, and give every rank the result."""
    result: Any = work() if is_main_process() else None
    return broadcast(result)


def broadcast(value: Result) -> Result:
    """The first rank's ``value``: computed on unlike processors it may differ in a last digit, and ranks must not part."""
    if world_size() == 1:
        return value
    box = [value]
    _talk(dist.broadcast_object_list, box, src=0)
    return box[0]


def all_gather(own: Result) -> list[Result]:
    """What each rank has, in the order of the ranks."""
    if world_size() == 1:
        return [own]
    box: list[Any] = [None] * world_size()
    _talk(dist.all_gather_object, box, own)
    return box


def local_main_first(work: Callable[[], Result]) -> Result:
    """``work`` on every rank, on the first of each host before the others: what it downloads or makes is there for them."""
    if world_size() == 1:
        return work()
    early = work() if _local_rank() == 0 else None
    _talk(dist.barrier)
    return work() if early is None else early


def map_sharded(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]], *, name: Callable[[Item], str]
) -> list[Result]:
    """``work(items)``, each rank on its own of them, by ``name``: one result for each item, in order, on every rank."""
    if world_size() == 1:
        return list(work(items))
    owners = _owners(items, name)
    found = [iter(results) for results in all_gather(list(work(_of(rank(), items, owners))))]
    return [next(found[owner]) for owner in owners]


def map_rows_sharded(
    items: Sequence[Item], work: Callable[[Sequence[Item]], NDArray[np.float32]], *, name: Callable[[Item], str]
) -> NDArray[np.float32]:
    """As ``map_sharded``, for one row of numbers an item, which travel without a second copy of them all."""
    if world_size() == 1:
        return work(items)
    owners = np.array(_owners(items, name))
    mine = _of(rank(), items, owners)
    own = work(mine) if mine else None
    shape = next(shape for shape in all_gather(None if own is None else own.shape[1:]) if shape is not None)
    rows = np.empty((len(items), *shape), np.float32)
    for source in range(world_size()):
        places = np.flatnonzero(owners == source)
        if len(places):
            part = own if source == rank() and own is not None else np.empty((len(places), *shape), np.float32)
            _talk(dist.broadcast, torch.from_numpy(part), src=source)
            rows[places] = part
    return rows


def shard_slice(count: int) -> slice:
    """This rank's of ``count`` rows: as many as the other ranks', or one more or less."""
    return slice(rank() * count // world_size(), (rank() + 1) * count // world_size())


def all_reduce_sum(value: Number) -> Number:
    """The sum over the ranks of each one's ``value``."""
    if world_size() == 1:
        return value
    box = torch.tensor(value, dtype=torch.float64)
    _talk(dist.all_reduce, box)
    return type(value)(box.item())


def broadcast_weights(part: nn.Module) -> None:
    """Give every rank the first one's weights."""
    if world_size() > 1:
        for tensor in part.state_dict().values():
            _talk(dist.broadcast, tensor, src=0)


def all_reduce_gradients(part: nn.Module) -> None:
    """Sum the gradients over the ranks; a rank whose share of the batch is empty has none, and adds zero."""
    if world_size() == 1:
        return
    trained = [p for p in part.parameters() if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    waiting = [_talk(dist.all_reduce, parameter.grad, async_op=True) for parameter in trained]
    for work in waiting:
        _talk(work.wait)


def shared_dropout(count: int) -> contextlib.AbstractContextManager[object]:
    """A forward pass inside draws dropout's random numbers for all ``count`` photos of the batch, and takes its share's.

    Every rank has the same seed, so together they drop what a single process would: on a CPU exactly that, as its numbers are
    drawn in the same order. A GPU's own process draws in another way; there all numbers of ranks above one agree.
    """
    return contextlib.nullcontext() if world_size() == 1 else _SharedDropout(count)


class _SharedDropout(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dropout of all kinds, alpha dropout and stochastic depth come down to two of torch's operations."""

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count, self._mine = count, shard_slice(count)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _drops_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        if func is aten.bernoulli_.float:
            return args[0].copy_(self._draw(args[0], *args[1:], **kwargs))
        if func is aten.native_dropout.default:
            numbers, chance = args[:2]
            kept = self._draw(numbers, 1 - chance)
            return numbers * kept / (1 - chance), kept.bool()
        raise RunError(f"This network draws random numbers in a way ({func}) that processes cannot share; train it in one.")

    def _draw(self, like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(like) != self._mine.stop - self._mine.start:
            raise RunError("This network draws random numbers that are not a photo's own; train it in one process.")
        return like.new_empty((self._count, *like.shape[1:])).bernoulli_(*args, **kwargs)[self._mine]


def _drops_nothing(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Attention is marked as random even where its dropout is none."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return "dropout_p" in names and not given.get("dropout_p")


def _owners(items: Sequence[Item], name: Callable[[Item], str]) -> list[int]:
    """The rank that sees to each item. It follows from the name: who has decoded a photo also computes its features."""
    digests = (hashlib.sha256(name(item).encode("utf-8", "surrogateescape")).digest() for item in items)
    return [int.from_bytes(digest[:8], "big") % world_size() for digest in digests]


def _of(number: int, items: Sequence[Item], owners: Sequence[int] | NDArray[np.int_]) -> list[Item]:
    return [item for item, owner in zip(items, owners, strict=True) if owner == number]


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _talk(what: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return what(*args, **kwargs)
    except RuntimeError as error:  # what gloo and NCCL say when a connection closes
        raise PeerLostError(
            "Another process of this training has died or cannot be reached; once it is mended, go on with the same command "
            f"and --resume. ({' '.join(str(error).split())[:200]})"
        ) from None


def _another_said_why(store: Store) -> bool:
    """Whether another rank failed before this one: then wait until it has printed its reason, as torchrun ends all at the
    first exit."""
    try:
        if store.add("finetune/failed", 1) == 1:
            atexit.register(_quietly, store.set, "finetune/said", "")
            return False
        _quietly(store.wait, ["finetune/said"], timedelta(seconds=10))
    except RuntimeError:  # the store went with its host
        return False
    return True


def _quietly(what: Callable[..., Any], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):
        what(*args)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
