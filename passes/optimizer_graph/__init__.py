"""Passes over one optimizer step of one parameter, as an ATen graph."""
