"""Images for people: rendering, thumbnails and the folder they come from."""
