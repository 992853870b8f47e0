"""The HTTP layer: gunicorn worker, admission control, request bodies, errors and security headers."""
