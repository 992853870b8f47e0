"""Rollout: replace the serving bundle without a failed request, and roll back."""
