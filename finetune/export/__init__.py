"""Export: from a trained network to a bundle."""
