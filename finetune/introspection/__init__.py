"""Inspect a network: layer summaries, filters and feature maps."""
