"""Passes over one region of the model, at the level of torch functions, before AOTAutograd."""
