"""Composed soundscapes of real recordings, with captions and their ground truth."""
