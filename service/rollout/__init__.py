"""Rollout: replace the current bundle without a failed request, and roll back."""
