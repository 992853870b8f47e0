"""Reviews: what people decide about images, and its history."""
