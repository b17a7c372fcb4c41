"""Passes over the graph of one region, at the level of torch functions, before AOTAutograd."""
