"""Inference engines (OpenVINO, PyTorch) and the selection of their numeric precision."""
