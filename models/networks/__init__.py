"""Networks in torch: the registry, pretrained weights, the classifier built on them, and its ONNX export."""
