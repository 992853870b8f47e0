"""The review gallery: pages, images, review decisions and exports."""
