"""Predictions and what is derived from them."""
