"""Download published photos of cats and dogs into an image folder."""
