"""The optimisation loop and what it needs."""
