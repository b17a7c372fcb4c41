"""Layers as the compiled graphs call them."""
