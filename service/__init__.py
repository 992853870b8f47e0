"""The inference service: serves what is in a bundle, over HTTP."""
