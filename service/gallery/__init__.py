"""Where people see what a model gets right and wrong, and put it right: pages, pictures, decisions, downloads."""
