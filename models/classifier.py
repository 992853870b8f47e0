"""A network made ready for a folder's classes: normalise, the network with its new head, LogSoftmax."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from models.errors import ConfigError, WeightsError, did_you_mean
from models.preprocess import Preprocessing
from models.registry import create_model
from models.spec import ModelSpec

State = Mapping[str, Tensor]


class Normalise(nn.Module):
    """(N, H, W, C) uint8 pixels -> (N, C, H, W) float32, scaled to 0..1, less the mean, over the standard deviation.

    It is a layer, so that the exported graph takes plain pixels and nobody can normalise a second time or in another way.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        shape = (1, -1, 1, 1)
        self.register_buffer("scale", (1 / (255 * std)).float().reshape(shape), persistent=False)
        self.register_buffer("shift", (-mean / std).float().reshape(shape), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift


class Classifier(nn.Module):
    """(N, H, W, C) uint8 pixels -> (N, classes) log-probabilities.

    ``net`` is the plain network with its head replaced, so its state dict loads into torchvision's own class.
    """

    def __init__(self, net: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.normalise = Normalise(preprocessing)
        self.net = net
        self.log_softmax = nn.LogSoftmax(dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.log_softmax(self.net(self.normalise(pixels)))


def build_classifier(
    spec: ModelSpec, *, num_classes: int, base: State | None, unfreeze: Iterable[str] = (), seed: int = 0
) -> Classifier:
    """Build ``spec``'s network with a new head for ``num_classes``, and freeze what is not to be trained.

    With ``base`` (pretrained weights) everything is frozen but the head and the layers named in ``unfreeze``; without it
    nothing is, as random weights have to learn. ``seed`` fixes the random numbers of the new weights. The network is in
    evaluation mode. Raises WeightsError where ``base`` is made for another network, ConfigError for an unknown layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if base is None:
            net = create_model(spec.name, num_classes=num_classes)
        else:
            with torch.device("meta"):  # nothing is drawn for weights that are replaced at once
                net = create_model(spec.name, num_classes=spec.pretrained_classes)
            load_base(net, base, spec)
            net.requires_grad_(False)
            replace_head(net, spec.head, num_classes)
            for name in unfreeze:
                _layer(net, name).requires_grad_(True)
    return Classifier(net, spec.preprocessing).eval()


def load_base(net: nn.Module, base: State, spec: ModelSpec) -> None:
    """Put pretrained tensors into ``net`` without copying them; the head may be of another size, as it is replaced.

    Half-precision numbers become float32. Names are matched, or, where none of them is the network's own, the order (a
    port of the same network by other hands). Raises WeightsError, which names the first tensor that does not fit.
    """
    wanted = net.state_dict()
    given = dict(base)
    if not set(given) & set(wanted) and len(given) == len(wanted):
        given = dict(zip(wanted, given.values(), strict=True))
    head = {f"{spec.head}.weight", f"{spec.head}.bias"}
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, torch.zeros((), dtype=torch.long))
        if name not in given:
            raise WeightsError(
                f"The weights are not {spec.name}'s: {name!r} is missing among their {len(base)} tensors; give the file "
                f"that was made for {spec.name}, or name its network with --backbone."
            )
        if given[name].shape != tensor.shape and name not in head:
            raise WeightsError(
                f"The weights are not {spec.name}'s: {name!r} is {tuple(given[name].shape)} and should be "
                f"{tuple(tensor.shape)}; give the file that was made for {spec.name}, or name its network with --backbone."
            )
    if extra := sorted(set(given) - set(wanted)):
        raise WeightsError(
            f"The weights are not {spec.name}'s: {extra[0]!r} is not part of that network; give the file that was made "
            f"for {spec.name}, or name its network with --backbone."
        )
    for name in head:
        given[name] = torch.zeros(wanted[name].shape)
    net.load_state_dict({name: given[name].to(tensor.dtype).contiguous() for name, tensor in wanted.items()}, assign=True)


def replace_head(net: nn.Module, head: str, num_classes: int) -> None:
    """Put a new, trainable layer of the same kind in the head's place, with ``num_classes`` outputs."""
    old = net.get_submodule(head)
    if not isinstance(old, nn.Linear):
        raise TypeError(f"a head is a Linear layer, {head} is {type(old).__name__}")
    parent, _, name = head.rpartition(".")
    setattr(net.get_submodule(parent), name, nn.Linear(old.in_features, num_classes, bias=old.bias is not None))


def trained_names(net: nn.Module) -> list[str]:
    """The state-dict names that training may change: trainable parameters and their layers' own statistics."""
    names = []
    for prefix, layer in net.named_modules():
        parameters = dict(layer.named_parameters(recurse=False))
        trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
        buffers = [name for name, _ in layer.named_buffers(recurse=False)] if trainable else []
        names += [f"{prefix}.{name}" if prefix else name for name in trainable + buffers]
    own = net.state_dict()
    return [name for name in own if name in set(names)]


def _layer(net: nn.Module, name: str) -> nn.Module:
    known = [n for n, layer in net.named_modules() if n and any(True for _ in layer.parameters())]
    if name not in known:
        raise ConfigError(
            f"--unfreeze names {name!r}, which is not a layer with parameters.{did_you_mean(name, known)} "
            f"The last ones are {', '.join(known[-4:])}."
        )
    return net.get_submodule(name)
