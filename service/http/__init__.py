"""HTTP below the application: how connections are accepted, read, answered and closed."""

# Keys of the WSGI environment, by which a server tells the application what it has decided before the body arrived.
SLOT = "service.slot"  # the request's place among those in flight
REJECTION = "service.rejection"  # the problem to answer with in place of the application's work
