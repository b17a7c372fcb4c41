"""Number formats: 8- and 4-bit tensors, stochastic rounding, and the storage of optimizer state."""
