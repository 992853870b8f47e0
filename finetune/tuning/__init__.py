"""Choose a network, or a join of networks, and its head by cross-validation of cached features."""
