"""Classify many images with a bundle, without a server. Never imports torch."""
