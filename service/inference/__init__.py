"""Inference: decode images, batch them and run the model."""
