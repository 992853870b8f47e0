"""The review database: predictions of models and decisions of reviewers. All SQL lives here and in ``service.reviews``."""
