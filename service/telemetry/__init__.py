"""Metrics for Prometheus and JSON logs."""
