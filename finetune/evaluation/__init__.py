"""Evaluate a bundle on labeled images, or every image of a data set by cross-validation."""
