"""A CLIP of open_clip's: where it comes from, what is attached to it, how it encodes."""
