"""Passes over the model's graph and the optimizer's graph, and the memory plan."""
