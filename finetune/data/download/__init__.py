"""Download public datasets of cats and dogs into an image folder."""
