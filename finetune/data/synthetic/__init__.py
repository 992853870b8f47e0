"""Synthetic images of cats and dogs for demos and tests."""
