"""Reports for people: plots, image sheets and the model card."""
