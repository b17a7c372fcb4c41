"""The optimizer: turns gradients into updates of weights, states and bases."""
