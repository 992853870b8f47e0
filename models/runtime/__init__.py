"""Engines that run an exported network, and the numeric precision they run it in."""
