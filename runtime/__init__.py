"""Code that runs during training: bases, per-parameter state, region dispatch, optimizer, refreshes and meter."""
