"""A network made ready for a folder's classes: normalise, the network with its new head, LogSoftmax."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from models.artifacts.bundle import WEIGHTS, Bundle
from models.errors import BundleError, ConfigError, WeightsError, did_you_mean
from models.networks.head_replacement import replace_heads
from models.networks.registry import create_model, get_spec
from models.networks.spec import ModelSpec
from models.networks.weights import read_tensors
from models.preprocess import Preprocessing

StateDict = Mapping[str, Tensor]


class Normalize(nn.Module):
    """(N, H, W, C) uint8 pixels -> (N, C, H, W) float32, scaled to 0..1, less the mean, over the standard deviation.

    It is a layer, so that the exported graph takes plain pixels and nobody can normalise a second time or in another way.
    With ``permute_pixels`` (a seed) the pixels of every picture change places, always in the same way, which is to show what a
    network owes to neighbourhood: place i is given the pixel that was at ``order[i]``.
    """

    scale: Tensor
    shift: Tensor
    order: Tensor

    def __init__(self, preprocessing: Preprocessing, *, permute_pixels: int | None = None) -> None:
        super().__init__()
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        shape = (1, -1, 1, 1)
        self.register_buffer("scale", (1 / (255 * std)).float().reshape(shape), persistent=False)
        self.register_buffer("shift", (-mean / std).float().reshape(shape), persistent=False)
        self.is_permuting = permute_pixels is not None
        if permute_pixels is not None:
            order = list(range(preprocessing.input_px**2))
            random.Random(permute_pixels).shuffle(order)
            self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        if self.is_permuting:
            side, channels = pixels.shape[1], pixels.shape[3]
            pixels = pixels.flatten(1, 2).index_select(1, self.order).reshape(-1, side, side, channels)
        return pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift


class Classifier(nn.Module):
    """(N, H, W, C) uint8 pixels -> (N, classes) log-probabilities.

    ``net`` is the plain network with its head replaced, so its state dict loads into torchvision's own class. One with
    auxiliary heads gives, while training, a tuple: its own log-probabilities, then those of each auxiliary head, whose losses
    count ``aux_weight`` each.
    """

    def __init__(
        self, net: nn.Module, preprocessing: Preprocessing, *, aux_weight: float = 0.0, permute_pixels: int | None = None
    ) -> None:
        super().__init__()
        self.normalize = Normalize(preprocessing, permute_pixels=permute_pixels)
        self.net = net
        self.log_softmax = nn.LogSoftmax(dim=1)
        self.aux_weight = aux_weight

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, ...]:
        logits = self.net(self.normalize(pixels))
        if isinstance(logits, tuple):
            return tuple(self.log_softmax(answer) for answer in logits)
        return self.log_softmax(logits)


def build_classifier(
    spec: ModelSpec,
    *,
    num_classes: int,
    base: StateDict | None,
    unfreeze: Iterable[str] = (),
    seed: int = 0,
    permute_pixels: int | None = None,
) -> Classifier:
    """Build ``spec``'s network with a new head for ``num_classes``, and freeze what is not to be trained.

    With ``base`` (pretrained weights) everything is frozen but the head and the layers named in ``unfreeze``; without it
    nothing is, as random weights have to learn, with the help of auxiliary heads where the network has them. ``seed`` fixes
    the random numbers of the new weights, ``permute_pixels`` is ``Normalize``'s. The network is in evaluation mode. Raises
    WeightsError where ``base`` is made for another network, ConfigError for an unknown layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if base is None:
            aux = {"aux": True} if spec.aux_weight else {}
            net = create_model(spec.name, num_classes=num_classes, **aux)
            classifier = Classifier(net, spec.preprocessing, aux_weight=spec.aux_weight, permute_pixels=permute_pixels)
            return classifier.eval()
        net = _to_be_filled(spec)
        load_base_weights(net, base, spec)
        net.requires_grad_(False)
        replace_heads(net, spec.heads, num_classes)
        for name in unfreeze:
            _layer(net, name).requires_grad_(True)
    return Classifier(net, spec.preprocessing, permute_pixels=permute_pixels).eval()


def load_classifier(bundle: Bundle) -> Classifier:
    """A whole bundle's network with its weights, in evaluation mode. Raises BundleError where some are missing."""
    spec = get_spec(bundle.backbone)
    classifier = build_classifier(spec, num_classes=len(bundle.classes), base=None, permute_pixels=bundle.permute_pixels)
    held = read_tensors(bundle.path / WEIGHTS)
    missing = classifier.net.load_state_dict(held, strict=False).missing_keys
    if any(not name.lower().startswith("aux") for name in missing):  # auxiliary heads are there while training only
        raise BundleError(f"The bundle {bundle.path} lacks the weights of {missing[0]}; train it again with this version.")
    return classifier


def load_base_weights(net: nn.Module, base: StateDict, spec: ModelSpec) -> None:
    """Put pretrained tensors into ``net`` without copying them; heads may be of another size or missing, as they are replaced.

    Half-precision numbers become float32. Names are matched, or, where none of them is the network's own, the order (a
    port of the same network by other hands). Raises WeightsError, which names the first tensor that does not fit.
    """
    wanted = net.state_dict()
    given = dict(base)
    if not set(given) & set(wanted) and len(given) == len(wanted):
        given = dict(zip(wanted, given.values(), strict=True))
    heads = {f"{head}.{tensor}" for head in spec.heads for tensor in ("weight", "bias")} & set(wanted)
    given |= {name: torch.zeros(wanted[name].shape) for name in heads}
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, torch.zeros((), dtype=torch.long))
        if name not in given:
            raise WeightsError(
                f"The weights are not {spec.name}'s: {name!r} is missing among their {len(base)} tensors; give the file "
                f"that was made for {spec.name}, or name its network with --backbone."
            )
        if given[name].shape != tensor.shape:
            raise WeightsError(
                f"The weights are not {spec.name}'s: {name!r} is {tuple(given[name].shape)} and should be "
                f"{tuple(tensor.shape)}; give the file that was made for {spec.name}, or name its network with --backbone."
            )
    if extra := sorted(set(given) - set(wanted)):
        raise WeightsError(
            f"The weights are not {spec.name}'s: {extra[0]!r} is not part of that network; give the file that was made "
            f"for {spec.name}, or name its network with --backbone."
        )
    net.load_state_dict({name: given[name].to(tensor.dtype).contiguous() for name, tensor in wanted.items()}, assign=True)


def trainable_names(net: nn.Module) -> list[str]:
    """The state-dict names that training may change: trainable parameters and their layers' own statistics."""
    names = []
    for prefix, layer in net.named_modules():
        parameters = dict(layer.named_parameters(recurse=False))
        trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
        buffers = [name for name, _ in layer.named_buffers(recurse=False)] if trainable else []
        names += [f"{prefix}.{name}" if prefix else name for name in trainable + buffers]
    own = net.state_dict()
    return [name for name in own if name in set(names)]


def _to_be_filled(spec: ModelSpec) -> nn.Module:
    """The network without numbers, as they would be replaced at once; with them where a state dict does not hold them all."""
    with torch.device("meta"):
        net = create_model(spec.name, num_classes=spec.pretrained_classes)
    held = net.state_dict()
    if all(name in held for name, _ in net.named_buffers()):
        return net
    return create_model(spec.name, num_classes=spec.pretrained_classes)


def _layer(net: nn.Module, name: str) -> nn.Module:
    known = [n for n, layer in net.named_modules() if n and any(True for _ in layer.parameters())]
    if name not in known:
        raise ConfigError(
            f"--unfreeze names {name!r}, which is not a layer with parameters.{did_you_mean(name, known)} "
            f"The last ones are {', '.join(known[-4:])}."
        )
    return net.get_submodule(name)
