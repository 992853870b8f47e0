"""Download public data sets of cats and dogs into an image folder."""
