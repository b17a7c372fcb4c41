"""What runs during training: bases, per-parameter state, dispatch of regions, the optimizer, refreshes, the meter."""
