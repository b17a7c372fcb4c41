"""Passes over the ATen graph of one optimizer step of one parameter."""
