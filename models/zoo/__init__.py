"""The networks, one family a file. Each file registers what it builds; see docs/adding-a-network.md."""
