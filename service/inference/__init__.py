"""Inference: decoding, batching and the model that serves."""
