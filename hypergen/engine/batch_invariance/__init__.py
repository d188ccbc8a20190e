"""The same bytes for an image, whatever shares its batch."""
