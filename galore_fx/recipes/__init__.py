"""Recipes for the training of weights: their parts, the published systems as named recipes, and the checks."""
