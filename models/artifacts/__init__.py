"""File formats that pass between training and serving: the bundle, predictions, reviews. Never imports torch."""
