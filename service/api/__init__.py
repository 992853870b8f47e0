"""The JSON API: predictions, health, administration and the Open Inference Protocol."""
