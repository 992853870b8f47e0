"""The HTTP layer below the application: connections, admission, request bodies, errors and security headers."""

import re

# Keys of the WSGI environment by which the server passes on what it decided before the body arrived.
SLOT = "service.slot"  # the request's slot among those in flight
REJECTION = "service.rejection"  # the problem to respond with
# Whether the server can pause a response between its chunks without holding a thread, and whether this response is to be.
CAN_STREAM = "service.can_stream"
EVENT_STREAM = "service.event_stream"
# Paths with threads of their own, as they must not wait for pages, or pages for them.
PROBE_PATHS = re.compile(r"/health/.*|/metrics|/v2/health/.*|/v2/models/[^/]+(/versions/[^/]+)?/ready")
IMAGE_PATHS = re.compile(r"/gallery/images/.*|/studio/datasets/[^/]+/photos/.+")
