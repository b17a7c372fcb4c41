"""What a projection misses of a gradient, and what becomes of it."""
