"""Devices, numeric precision and distributed training."""
