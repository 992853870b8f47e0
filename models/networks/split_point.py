"""Where the frozen part ends: a network is cut behind its last deterministic frozen layer.

What lies before the cut gives the same numbers for a photo in every epoch, so it needs to run only once; what follows has
dropout or parameters that learn and runs in every epoch, exactly as in the whole network. The place is found in the traced
graph of the network (torch.fx), not written down for each one: VGG16 is cut behind ``classifier.1`` (4096 numbers),
a network with nothing but pooling before its head behind the pooling.
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
    """Trace down to the layers that hold no others, so that padding computed in Python inside one is not looked into.

    BatchNorm is always a layer: timm's holds an activation, and looked into it would stay as it is while it is traced.
    So is what cannot be looked into, as its Python code depends on shapes: the innermost such module is taken whole.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == "normalize" or isinstance(m, _BatchNorm) or not any(True for _ in m.children())

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nodes, depth = len(self.graph.nodes), len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # whatever Python says when it meets a placeholder in a number's place
            for node in list(reversed(self.graph.nodes))[: len(self.graph.nodes) - nodes]:
                self.graph.erase_node(node)
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


@dataclass(frozen=True)
class SplitModel:
    """``trainable(frozen(pixels))`` is the whole network; both share its parameters. ``last_frozen`` is a layer's name."""

    frozen: GraphModule
    trainable: GraphModule
    last_frozen: str


def trace(classifier: Classifier) -> Graph:
    """The network's layers and operations in the order in which they run. Raises ConfigError for one that hides them."""
    graph = _LeafTracer().trace(classifier)
    if any(node.target == "net" for node in graph.nodes):
        raise ConfigError(
            "This network's code depends on the shape of what it is given, so its frozen part cannot be found (torch.fx cannot "
            "trace it); choose another with --backbone, `finetune models` lists them."
        )
    return graph


def traced_layers(classifier: Classifier) -> set[str]:
    """The names of the layers whose output the traced graph knows: all of them, but for those inside of one taken whole."""
    return {name for node in trace(classifier).nodes for name in {_name(node), *_stack(node)}}


def split_model(classifier: Classifier) -> SplitModel:
    """Cut the network behind its last deterministic frozen layer, at a place that a single tensor crosses.

    What is trained gives a tuple where the network has auxiliary heads: its own answer, then theirs.
    """
    mode = classifier.training
    classifier.train(mode or classifier.aux_weight > 0)  # auxiliary heads run only while training
    graph = trace(classifier)
    classifier.train(mode)
    nodes = [node for node in graph.nodes if node.op != "output"]
    alive = next(i for i, node in enumerate(nodes) if _is_alive(node, classifier))
    at = next(i for i in range(alive, 0, -1) if len(_crossing(nodes, i)) == 1)
    (crossing,) = _crossing(nodes, at)
    frozen = GraphModule(classifier, _copy(nodes[:at], outputs=[crossing]))
    trainable = GraphModule(classifier, _copy(nodes[at:], outputs=_results(graph), given=crossing))
    return SplitModel(frozen=frozen, trainable=trainable, last_frozen=_place(crossing, graph))


def with_outputs(classifier: Classifier, layers: Sequence[tuple[str, bool]]) -> GraphModule:
    """The whole network, giving ``(log_probs, *extras)``: for each (layer, is_input) that layer's output, or its input.

    The input of a convolution is a map; its mean over the map is given, as a Linear layer in its place would see it.
    """
    graph = trace(classifier)
    extras: list[Node] = []
    for layer, is_input in layers:
        node = _last_inside(layer, graph)
        if is_input and isinstance(classifier.net.get_submodule(layer), nn.Conv2d):
            with graph.inserting_after(node.all_input_nodes[0]):
                extras.append(graph.call_function(torch.mean, (node.all_input_nodes[0], (2, 3))))
        else:
            extras.append(node.all_input_nodes[0] if is_input else node)
    nodes = [node for node in graph.nodes if node.op != "output"]
    return GraphModule(classifier, _copy(nodes, outputs=[*_results(graph), *extras]))


def train_mode(part: nn.Module) -> None:
    """Switch to training, but leave frozen BatchNorm as it is: its statistics do not move."""
    part.train()
    for layer in part.modules():
        if isinstance(layer, _BatchNorm) and not any(p.requires_grad for p in layer.parameters()):
            layer.eval()


def _is_alive(node: Node, classifier: Classifier) -> bool:
    """Whether a node is random while training, or learns."""
    if node.op == "get_attr":  # a parameter of its own, such as a transformer's class token
        owner, _, name = str(node.target).rpartition(".")
        return bool(getattr(classifier.get_submodule(owner), name).requires_grad)
    if node.op != "call_module":
        return False
    layer = classifier.get_submodule(str(node.target))
    return any(map(_is_random, layer.modules())) or any(parameter.requires_grad for parameter in layer.parameters())


def _is_random(layer: nn.Module) -> bool:
    chance = getattr(layer, {"StochasticDepth": "p", "DropPath": "drop_prob"}.get(type(layer).__name__, ""), 0.0)
    return (isinstance(layer, _DropoutNd) and layer.p > 0) or chance > 0


def _crossing(nodes: Sequence[Node], at: int) -> list[Node]:
    """The nodes before ``at`` whose values are used at or behind it."""
    before = set(nodes[:at])
    return [node for node in nodes[:at] if any(user not in before for user in node.users)]


def _copy(nodes: Sequence[Node], *, outputs: Sequence[Node], given: Node | None = None) -> Graph:
    graph = Graph()
    copies: dict[Node, Node] = {}
    if given is not None:
        copies[given] = graph.placeholder("features")
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    result = tuple(copies[node] for node in outputs)
    graph.output(result if len(result) > 1 else result[0])
    return graph


def _results(graph: Graph) -> list[Node]:
    """What the network gives: its log-probabilities, and those of its auxiliary heads where they were traced."""
    return next(node for node in graph.nodes if node.op == "output").all_input_nodes


def _name(node: Node) -> str:
    """The node's name as a person knows it: its layer in the plain network, or the operation."""
    name = str(node.target) if node.op == "call_module" else node.name
    return name.removeprefix("net.")


def _last_inside(layer: str, graph: Graph) -> Node:
    """The node of a layer, or, for one that holds others (a stage of blocks), the last thing that is computed inside it."""
    nodes = (node for node in reversed(graph.nodes) if node.op != "output")  # a layer of that name is another thing
    return next(node for node in nodes if _name(node) == layer or layer in _stack(node))


def _place(node: Node, graph: Graph) -> str:
    """A node's name for a person: an operation that is a layer's last one goes by the layer's, such as SqueezeNet's cat."""
    layers = sorted(_stack(node) - {"net"}, key=len, reverse=True)
    last_of = (layer for layer in layers[:1] if _last_inside(layer, graph) is node)
    return next(last_of, _name(node))


def _stack(node: Node) -> set[str]:
    """The layers that a node is computed in, from the outermost to its own."""
    return {path.removeprefix("net.") for path, _ in node.meta.get("nn_module_stack", {}).values()}
