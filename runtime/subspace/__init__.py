"""Subspaces of weights: projection, bases, and their refreshes."""
