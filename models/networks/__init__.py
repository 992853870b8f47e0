"""Networks in PyTorch: the registry, pretrained weights, the classifier built from them, and its ONNX export."""
