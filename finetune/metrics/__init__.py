"""Metrics with confidence intervals, calibration, and tests of significance."""
