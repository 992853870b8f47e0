"""Build the image classifier for a dataset's classes: normalization, a network with a new head, and LogSoftmax."""

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
from models.networks.weights import part_prefix, read_tensors
from models.preprocess import Preprocessing

StateDict = Mapping[str, Tensor]


class Normalize(nn.Module):
    """Normalize (N, H, W, C) uint8 pixels to (N, C, H, W) float32: scale to 0..1, subtract the mean, divide by the std.

    As a layer, it is part of the exported graph, which therefore takes plain pixels and cannot be fed with pixels that are
    normalized differently or twice.

    Args:
        preprocessing: Contains the mean and the standard deviation per channel.
        permute_pixels: Seed of a fixed permutation of the pixel positions, which shows how much a network relies on local
            structure. Position i gets the pixel of position ``order[i]``. None keeps the positions.
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
    """Map (N, H, W, C) uint8 pixels to (N, classes) log-probabilities.

    A network with auxiliary heads returns a tuple during training: its own log-probabilities, then those of each auxiliary
    head.

    Args:
        net: The network with its head replaced. Its state dict is compatible with torchvision's class.
        preprocessing: Contains the normalization.
        aux_weight: Weight of each auxiliary head's loss.
        permute_pixels: See ``Normalize``.
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
            return tuple(self.log_softmax(head_logits) for head_logits in logits)
        return self.log_softmax(logits)


def build_classifier(
    spec: ModelSpec,
    *,
    num_classes: int,
    base: StateDict | None,
    unfreeze: Iterable[str] = (),
    seed: int = 0,
    permute_pixels: int | None = None,
    normalize_embedding: bool = False,
) -> Classifier:
    """Build a network with a new head, and freeze the layers that are not trained.

    Args:
        spec: The network.
        num_classes: The number of outputs of the new head.
        base: Pretrained weights; all layers except the head and ``unfreeze`` are frozen. None starts from random weights,
            trains all layers, and adds the auxiliary heads if the network has any.
        unfreeze: Names of further layers to train.
        seed: Seed of the new weights.
        permute_pixels: See ``Normalize``.
        normalize_embedding: Make the new head a ``NormalizedLinear``.

    Returns:
        The classifier in evaluation mode.

    Raises:
        WeightsError: ``base`` does not fit the network.
        ConfigError: A layer in ``unfreeze`` does not exist.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if base is None:
            aux = {"aux": True} if spec.aux_weight else {}
            net = create_model(spec.name, num_classes=num_classes, **aux)
            if normalize_embedding:
                replace_heads(net, spec.heads, num_classes, normalize=True)
            classifier = Classifier(net, spec.preprocessing, aux_weight=spec.aux_weight, permute_pixels=permute_pixels)
            return classifier.eval()
        net = _build_empty(spec)
        load_base_weights(net, base, spec)
        net.requires_grad_(False)
        replace_heads(net, spec.heads, num_classes, normalize=normalize_embedding)
        for name in unfreeze:
            _get_layer(net, name).requires_grad_(True)
    return Classifier(net, spec.preprocessing, permute_pixels=permute_pixels).eval()


def load_classifier(bundle: Bundle) -> Classifier:
    """Load a full bundle's classifier in evaluation mode. Raises BundleError if weights are missing."""
    if bundle.lacks_weights:
        raise BundleError(
            f"The bundle {bundle.path} has no {WEIGHTS}, which PyTorch needs. Run `finetune merge {bundle.path}` to add the "
            "pretrained weights."
        )
    spec = get_spec(bundle.backbone)
    classifier = build_classifier(
        spec,
        num_classes=len(bundle.classes),
        base=None,
        permute_pixels=bundle.permute_pixels,
        normalize_embedding=bundle.normalizes_embedding,
    )
    tensors = read_tensors(bundle.path / WEIGHTS)
    missing = classifier.net.load_state_dict(tensors, strict=False).missing_keys
    if any(not name.lower().startswith("aux") for name in missing):  # auxiliary heads exist only during training
        raise BundleError(f"The bundle {bundle.path} lacks the weights of {missing[0]}. Train it again with this version.")
    return classifier


def load_base_weights(net: nn.Module, base: StateDict, spec: ModelSpec) -> None:
    """Load pretrained tensors into a network without copying them. See ``match_tensors``."""
    if spec.parts:
        base = _match_parts(base, spec)
    net.load_state_dict(match_tensors(net.state_dict(), base, spec), assign=True)


def match_tensors(expected: StateDict, base: StateDict, spec: ModelSpec) -> dict[str, Tensor]:
    """Return the pretrained tensors by their names in the network.

    Tensors are matched by name, or by order if no name matches (a port of the same network). Other precisions are converted
    to float32. The heads may be missing or have another size, because they are replaced later.

    Args:
        expected: The tensors of the network by name.
        base: The pretrained tensors by name.
        spec: The network's spec.

    Raises:
        WeightsError: The tensors do not fit the network. The message names the first one that does not.
    """
    tensors = dict(base)
    if not set(tensors) & set(expected) and len(tensors) == len(expected):
        tensors = dict(zip(expected, tensors.values(), strict=True))
    heads = {f"{head}.{tensor}" for head in spec.heads for tensor in ("weight", "bias")} & set(expected)
    tensors |= {name: torch.zeros(expected[name].shape) for name in heads}
    hint = f"Use the weights of {spec.name}, or select the matching network with --backbone."
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, torch.zeros((), dtype=torch.long))
        if name not in tensors:
            raise WeightsError(
                f"The weights are not for {spec.name}: {name!r} is missing among their {len(base)} tensors. {hint}"
            )
        if tensors[name].shape != tensor.shape:
            raise WeightsError(
                f"The weights are not for {spec.name}: {name!r} has the shape {tuple(tensors[name].shape)}, "
                f"expected {tuple(tensor.shape)}. {hint}"
            )
    if extra := sorted(set(tensors) - set(expected)):
        raise WeightsError(f"The weights are not for {spec.name}: {extra[0]!r} is not part of that network. {hint}")
    return {name: tensors[name].to(tensor.dtype).contiguous() for name, tensor in expected.items()}


def _match_parts(base: StateDict, spec: ModelSpec) -> dict[str, Tensor]:
    """Match the tensors of each network of a join with those of the network alone, and leave out its head."""
    tensors: dict[str, Tensor] = {}
    for number, part in enumerate(spec.parts):
        prefix = part_prefix(number)
        own = {name.removeprefix(prefix): tensor for name, tensor in base.items() if name.startswith(prefix)}
        with torch.device("meta"):
            expected = create_model(part.name).state_dict()
        matched = match_tensors(expected, own, part)
        tensors |= {prefix + name: tensor for name, tensor in matched.items() if name.rpartition(".")[0] != part.head}
    return tensors


def trainable_names(net: nn.Module) -> list[str]:
    """List the state-dict names that training can change: trainable parameters and the buffers of their layers."""
    names = []
    for prefix, layer in net.named_modules():
        parameters = dict(layer.named_parameters(recurse=False))
        trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
        buffers = [name for name, _ in layer.named_buffers(recurse=False)] if trainable else []
        names += [f"{prefix}.{name}" if prefix else name for name in trainable + buffers]
    return [name for name in net.state_dict() if name in set(names)]


def _build_empty(spec: ModelSpec) -> nn.Module:
    """Build the network on the meta device, or with real values if it has buffers that a state dict does not contain."""
    with torch.device("meta"):
        net = create_model(spec.name, num_classes=spec.pretrained_classes)
    state = net.state_dict()
    if all(name in state for name, _ in net.named_buffers()):
        return net
    return create_model(spec.name, num_classes=spec.pretrained_classes)


def _get_layer(net: nn.Module, name: str) -> nn.Module:
    known = [n for n, layer in net.named_modules() if n and any(True for _ in layer.parameters())]
    if name not in known:
        raise ConfigError(
            f"--unfreeze: {name!r} is not a layer with parameters.{did_you_mean(name, known)} "
            f"The last layers are {', '.join(known[-4:])}."
        )
    return net.get_submodule(name)
