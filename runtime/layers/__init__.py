"""Layers that the compiled graphs call."""
