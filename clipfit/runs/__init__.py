"""The run folder, and files that are complete or absent."""
