"""Memory measurement during training."""
