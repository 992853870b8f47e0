"""Metrics with confidence intervals, calibration and significance tests."""
