"""File formats shared by training and serving: bundles, predictions, evaluations and reviews. Does not import torch."""
