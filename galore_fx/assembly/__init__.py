"""Turns a request into a model that trains: decisions, normalised and quantised weights, optimizer, forwards."""
