"""Labelled images: where they are, what they are called, and how they become tensors."""
