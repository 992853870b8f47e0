"""Training: from an image folder to a trained network and its run directory."""
