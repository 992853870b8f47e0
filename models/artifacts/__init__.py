"""File formats shared by training and serving: bundles, predictions, evaluations, reviews and similarity.

Also their paths, statistics and label issues. Does not import torch."""
