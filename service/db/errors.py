"""Exceptions of the review database. Each message states what was wrong and what to do.

UserError
├── DatabaseUnavailableError
├── RecordNotFoundError
├── InvalidFilterError
├── IncompatibleModelsError
├── InvalidReviewError
├── ReviewConflictError
├── NothingToUndoError
├── JobConflictError
└── JobQueueFullError
"""

from __future__ import annotations

from models.errors import UserError


class DatabaseUnavailableError(UserError):
    """The database cannot be reached, is locked for too long, or failed. The log has the reason."""


class RecordNotFoundError(UserError):
    """The database has no such model or photo."""


class InvalidFilterError(UserError):
    """A filter names a class that the model does not have."""


class IncompatibleModelsError(UserError):
    """Two models with different classes cannot be compared."""


class InvalidReviewError(UserError):
    """A review cannot be saved as it is."""


class ReviewConflictError(UserError):
    """Another reviewer decided about the photo in the meantime."""


class NothingToUndoError(UserError):
    """The photo has no review that could be undone."""


class JobConflictError(UserError):
    """A training cannot be started, cancelled, resumed or deleted in the state that it is in."""


class JobQueueFullError(UserError):
    """As many trainings wait as are allowed."""
