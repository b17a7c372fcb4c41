"""The optimizer: gradients in, updated weights, states and bases out."""
