"""Audio and text in, captions out."""
