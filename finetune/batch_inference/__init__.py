"""Predict without a server: a few images in memory, or any number into Parquet files. Never imports torch."""
