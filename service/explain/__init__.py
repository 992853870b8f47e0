"""Heat maps of the image regions that support a class."""
