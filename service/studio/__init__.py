"""The studio: collect and label photos, train, and put a model live, all from the browser."""
