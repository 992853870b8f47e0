"""The registered networks, one family per file. See docs/adding-a-network.md."""
