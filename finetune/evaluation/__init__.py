"""Evaluate a bundle on labeled images or by cross-validation, and derive from that its decision rule and its graph in int8."""
