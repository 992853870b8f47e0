"""Arrays on disk, reading ahead in threads, and output folders that are complete or absent."""
