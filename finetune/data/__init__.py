"""Image folders: reading, inspecting, auditing, downloading and correcting them."""
