"""Array cache on disk, threaded mapping, and atomic output folders."""
