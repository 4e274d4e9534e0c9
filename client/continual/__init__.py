"""Continual learning at a client."""
