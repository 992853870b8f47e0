"""Split a network after its last deterministic frozen layer.

The frozen module computes the same features for an image in every epoch, so it runs only once per image. The trainable
module contains dropout or trainable parameters and runs in every epoch. The split point is derived from the traced network
(https://docs.pytorch.org/docs/stable/fx.html): VGG16 is split after ``classifier.1`` (4096 features), and a network with only
pooling before its head is split after the pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from models.errors import ConfigError
from models.networks.classifier import Classifier


class _LeafTracer(Tracer):
    """Trace down to the modules without children, so padding computed in Python inside a layer is not traced.

    BatchNorm is always a leaf: timm's contains an activation, and tracing into it would fix its training mode.
    A module that cannot be traced because its code depends on shapes becomes a leaf as well (the innermost such module).
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == "normalize" or isinstance(m, _BatchNorm) or not any(True for _ in m.children())

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nodes, depth = len(self.graph.nodes), len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # untraceable code raises many types when it uses a proxy as a number
            for node in list(reversed(self.graph.nodes))[: len(self.graph.nodes) - nodes]:
                self.graph.erase_node(node)
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


@dataclass(frozen=True)
class SplitModel:
    """A network split into two modules that share its parameters: ``trainable(frozen(pixels))`` equals the network.

    ``last_frozen`` is the name of the last frozen layer.
    """

    frozen: GraphModule
    trainable: GraphModule
    last_frozen: str


def trace(classifier: Classifier) -> Graph:
    """Trace the network's layers and operations in execution order. Raises ConfigError if it cannot be traced."""
    graph = _LeafTracer().trace(classifier)
    if any(node.target == "net" for node in graph.nodes):
        raise ConfigError(
            "The frozen layers of this network cannot be determined: torch.fx cannot trace it, because its code depends on "
            "the input's shape. Choose another network with --backbone; `finetune models` lists all networks."
        )
    return graph


def traced_layers(classifier: Classifier) -> set[str]:
    """Return the names of all layers whose output is in the traced graph; layers inside a leaf are missing."""
    return {name for node in trace(classifier).nodes for name in {_layer_name(node), *_enclosing_layers(node)}}


def split_model(classifier: Classifier) -> SplitModel:
    """Split the network after its last deterministic frozen layer, where a single tensor connects both modules.

    If the network has auxiliary heads, the trainable module returns a tuple: its own output, then theirs.
    """
    mode = classifier.training
    classifier.train(mode or classifier.aux_weight > 0)  # auxiliary heads run only in training mode
    graph = trace(classifier)
    classifier.train(mode)
    nodes = [node for node in graph.nodes if node.op != "output"]
    first_active = next(i for i, node in enumerate(nodes) if _is_trainable_or_random(node, classifier))
    split = next(i for i in range(first_active, 0, -1) if len(_crossing_nodes(nodes, i)) == 1)
    (crossing,) = _crossing_nodes(nodes, split)
    frozen = GraphModule(classifier, _copy_nodes(nodes[:split], outputs=[crossing]))
    trainable = GraphModule(classifier, _copy_nodes(nodes[split:], outputs=_output_nodes(graph), features=crossing))
    return SplitModel(frozen=frozen, trainable=trainable, last_frozen=_display_name(crossing, graph))


def with_outputs(classifier: Classifier, layers: Sequence[tuple[str, bool]]) -> GraphModule:
    """Extend the network to return ``(log_probs, *extras)``.

    Args:
        classifier: The network.
        layers: (layer name, is_input) for each extra: the layer's input or its output. The input of a convolution, a feature
            map, is averaged over its positions, as a Linear layer in its place would get it.
    """
    graph = trace(classifier)
    extras: list[Node] = []
    for layer, is_input in layers:
        node = _last_node(layer, graph)
        if is_input and isinstance(classifier.net.get_submodule(layer), nn.Conv2d):
            with graph.inserting_after(node.all_input_nodes[0]):
                extras.append(graph.call_function(torch.mean, (node.all_input_nodes[0], (2, 3))))
        else:
            extras.append(node.all_input_nodes[0] if is_input else node)
    nodes = [node for node in graph.nodes if node.op != "output"]
    return GraphModule(classifier, _copy_nodes(nodes, outputs=[*_output_nodes(graph), *extras]))


def train_mode(module: nn.Module) -> None:
    """Switch to training mode, but keep frozen BatchNorm in evaluation mode, so that its statistics do not change."""
    module.train()
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and not any(p.requires_grad for p in layer.parameters()):
            layer.eval()


def _is_trainable_or_random(node: Node, classifier: Classifier) -> bool:
    """Return whether a node has trainable parameters or is random during training."""
    if node.op == "get_attr":  # a parameter outside of a layer, such as a transformer's class token
        owner, _, name = str(node.target).rpartition(".")
        return bool(getattr(classifier.get_submodule(owner), name).requires_grad)
    if node.op != "call_module":
        return False
    layer = classifier.get_submodule(str(node.target))
    return any(map(_is_random, layer.modules())) or any(parameter.requires_grad for parameter in layer.parameters())


def _is_random(layer: nn.Module) -> bool:
    drop_prob = getattr(layer, {"StochasticDepth": "p", "DropPath": "drop_prob"}.get(type(layer).__name__, ""), 0.0)
    return (isinstance(layer, _DropoutNd) and layer.p > 0) or drop_prob > 0


def _crossing_nodes(nodes: Sequence[Node], split: int) -> list[Node]:
    """Return the nodes before index ``split`` whose values are used at or after it."""
    before = set(nodes[:split])
    return [node for node in nodes[:split] if any(user not in before for user in node.users)]


def _copy_nodes(nodes: Sequence[Node], *, outputs: Sequence[Node], features: Node | None = None) -> Graph:
    """Copy nodes to a new graph; the node ``features`` becomes its placeholder."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    if features is not None:
        copies[features] = graph.placeholder("features")
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    result = tuple(copies[node] for node in outputs)
    graph.output(result if len(result) > 1 else result[0])
    return graph


def _output_nodes(graph: Graph) -> list[Node]:
    """Return the nodes of the log-probabilities, followed by those of traced auxiliary heads."""
    return next(node for node in graph.nodes if node.op == "output").all_input_nodes


def _layer_name(node: Node) -> str:
    """Return the name of the node's layer in the plain network, or of its operation."""
    name = str(node.target) if node.op == "call_module" else node.name
    return name.removeprefix("net.")


def _last_node(layer: str, graph: Graph) -> Node:
    """Return the node of a layer, or the last node inside a layer with children, such as a stage of blocks."""
    nodes = (node for node in reversed(graph.nodes) if node.op != "output")  # a head may be named "output" as well
    return next(node for node in nodes if _layer_name(node) == layer or layer in _enclosing_layers(node))


def _display_name(node: Node, graph: Graph) -> str:
    """Return a node's name; the last operation of a layer, such as SqueezeNet's cat, gets the layer's name."""
    layers = sorted(_enclosing_layers(node) - {"net"}, key=len, reverse=True)
    matches = (layer for layer in layers[:1] if _last_node(layer, graph) is node)
    return next(matches, _layer_name(node))


def _enclosing_layers(node: Node) -> set[str]:
    """Return the names of all layers that contain a node."""
    return {path.removeprefix("net.") for path, _ in node.meta.get("nn_module_stack", {}).values()}
