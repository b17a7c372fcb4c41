"""Dispatch of calls of a model and its blocks, and guards against unsupported use."""
