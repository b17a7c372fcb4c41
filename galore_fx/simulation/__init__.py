"""Training steps on fake tensors: what a step will take, before anything of it is allocated."""
