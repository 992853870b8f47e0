"""Evaluate a bundle on labelled images, or every image of a data set by cross-validation."""
