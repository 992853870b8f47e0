"""Where the frozen part ends: a network is cut behind its last deterministic frozen layer.

What lies before the cut gives the same numbers for a photo in every epoch, so it needs to run only once; what follows has
dropout or parameters that learn and runs in every epoch, exactly as in the whole network. The place is found in the traced
graph of the network (torch.fx), not written down for each one: VGG16 is cut behind ``classifier.1`` (4096 numbers),
a network with nothing but pooling before its head behind the pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from models.classifier import Classifier


class _LeafTracer(Tracer):
    """Trace down to the layers that hold no others, so that padding computed in Python inside one is not looked into.

    BatchNorm is always a layer: timm's holds an activation, and looked into it would stay as it is while it is traced.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == "normalise" or isinstance(m, _BatchNorm) or not any(True for _ in m.children())


@dataclass(frozen=True)
class Cut:
    """``trained(frozen(pixels))`` is the whole network; both share its parameters. ``after`` names the last frozen layer."""

    frozen: GraphModule
    trained: GraphModule
    after: str


def trace(classifier: Classifier) -> Graph:
    """The network's layers and operations in the order in which they run."""
    return _LeafTracer().trace(classifier)


def cut(classifier: Classifier) -> Cut:
    """Cut the network behind its last deterministic frozen layer, at a place that a single tensor crosses."""
    graph = trace(classifier)
    layers = dict(classifier.named_modules())
    nodes = [node for node in graph.nodes if node.op != "output"]
    alive = next(i for i, node in enumerate(nodes) if _is_alive(node, layers))
    at = next(i for i in range(alive, 0, -1) if len(_crossing(nodes, i)) == 1)
    (crossing,) = _crossing(nodes, at)
    frozen = GraphModule(classifier, _copy(nodes[:at], outputs=[crossing]))
    trained = GraphModule(classifier, _copy(nodes[at:], outputs=[_result(graph)], given=crossing))
    return Cut(frozen=frozen, trained=trained, after=_name(crossing))


def with_outputs(classifier: Classifier, layers: Sequence[tuple[str, bool]]) -> GraphModule:
    """The whole network, giving ``(log_probs, *extras)``: for each (layer, is_input) that layer's output, or its input."""
    graph = trace(classifier)
    extras: list[Node] = []
    for layer, is_input in layers:
        node = _last_inside(layer, graph)
        extras.append(node.all_input_nodes[0] if is_input else node)
    nodes = [node for node in graph.nodes if node.op != "output"]
    return GraphModule(classifier, _copy(nodes, outputs=[_result(graph), *extras]))


def train_mode(part: nn.Module) -> None:
    """Switch to training, but leave frozen BatchNorm as it is: its statistics do not move."""
    part.train()
    for layer in part.modules():
        if isinstance(layer, _BatchNorm) and not any(p.requires_grad for p in layer.parameters()):
            layer.eval()


def _is_alive(node: Node, layers: dict[str, nn.Module]) -> bool:
    """Whether a node is random while training, or learns."""
    if node.op != "call_module":
        return False
    layer = layers[str(node.target)]
    random = (isinstance(layer, _DropoutNd) and layer.p > 0) or type(layer).__name__ in ("StochasticDepth", "DropPath")
    return random or any(parameter.requires_grad for parameter in layer.parameters())


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


def _result(graph: Graph) -> Node:
    output: Node = next(node for node in graph.nodes if node.op == "output")
    return output.all_input_nodes[0]


def _name(node: Node) -> str:
    """The node's name as a person knows it: its layer in the plain network, or the operation."""
    name = str(node.target) if node.op == "call_module" else node.name
    return name.removeprefix("net.")


def _last_inside(layer: str, graph: Graph) -> Node:
    """The node of a layer, or, for one that holds others (a stage of blocks), the last that runs inside it."""
    inside: list[Node] = [n for n in graph.nodes if n.op == "call_module" and f"{_name(n)}.".startswith(f"{layer}.")]
    return inside[-1]
