"""Pages outside the gallery, and the layout that all pages share."""
