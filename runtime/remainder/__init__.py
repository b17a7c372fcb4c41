"""The remainder that a projection misses of a gradient, and its use in training."""
