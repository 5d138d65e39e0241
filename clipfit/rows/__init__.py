"""Rows without end on their way to a file: kept as they come, gone on with after a kill, whole under their name."""
