"""Read, inspect, audit, download and relabel image folders."""
