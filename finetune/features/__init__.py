"""Features of the frozen layers: computed once per image and cached on disk."""
